"""What a client shows a server: owns the API key's header and the certificates of a channel.

Called by kvrelay/client.py.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from kvrelay.peer import KvrelayError
from kvrelay.tls import CertificatesError, grpc_channel


def authorization(api_key: str | None) -> list[tuple[str, str]]:
    """The metadata of every call; raises KvrelayError for what can be no key."""
    if not api_key:
        return []
    if not all("!" <= char <= "~" for char in api_key):
        # Without the key itself: errors end up in logs.
        message = "the API key has characters that no key has: is it whole, and alone?"
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, message)
    return [("authorization", f"Bearer {api_key}")]


def channel_credentials(certificates: Path) -> grpc.ChannelCredentials:
    """Raises KvrelayError for a folder that cannot be used."""
    try:
        return grpc_channel(certificates)
    except CertificatesError as error:
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
