"""The server as its client sees it: owns the address, and what a failed request is told as.

Called by kvrelay/client.py and what it is made of. gRPC says much the same of a server that is
down, one that refuses and one that is slow; here each gets a line that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

# How gRPC's own messages begin, and what they hold: the codes are the same as the server's own.
_NOT_CONNECTED = ("failed to connect to all addresses", "errors resolving", "DNS resolution")
_CODES_OF_LOSS = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_LOST = (
    *("Socket closed", "Connection reset", "Broken pipe", "Stream removed", "GOAWAY", "RST_STREAM"),
    *("recvmsg", "sendmsg", "keepalive", "ping timeout", "Transport closed", "timed out"),
)
_CANCELLED_LOCALLY = ("Locally cancelled by application!", "Channel closed!")
CANCELLED = "the request was cancelled"


class KvrelayError(Exception):
    """A request that failed. `code` is gRPC's status code; str() is one line for a person.

    retry_ms: when the server suggests to try again; None: it does not. lost: the connection broke,
    or the server says nothing any more, after it had the request.
    """

    lost = False

    def __init__(self, code: grpc.StatusCode, message: str, retry_ms: int | None = None) -> None:
        super().__init__(code, message, retry_ms)
        self.code = code
        self.message = message
        self.retry_ms = retry_ms

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Peer:
    """Whom a request is sent to and for how long: what an error has to be told with."""

    address: str
    timeout_s: float

    def within(self, timeout_s: float | None) -> Peer:
        return self if timeout_s is None else dataclasses.replace(self, timeout_s=timeout_s)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns what gRPC raises into KvrelayError."""
        try:
            yield
        except grpc.RpcError as error:
            retry_ms = _retry_ms(error.trailing_metadata())
            raise self.explain(error.code(), error.details() or "", retry_ms) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: it is how grpc.aio reports a call that we cancelled.
            raise KvrelayError(grpc.StatusCode.CANCELLED, CANCELLED) from None

    def explain(
        self, code: grpc.StatusCode, details: str, retry_ms: int | None = None
    ) -> KvrelayError:
        """The error to raise: the server's own words, or ours where gRPC's would not help."""
        message = " ".join(details.split())
        lost = retry_ms is None and _is_lost(code, message)
        if code is grpc.StatusCode.UNAVAILABLE:
            message = self._explain_unavailable(message)
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED and message == "Deadline Exceeded":
            message = f"{self.address} did not finish the request within {self.timeout_s:g} s"
        elif any(words in message for words in _CANCELLED_LOCALLY):
            message = CANCELLED
        message = message or f"{self.address} failed without a word ({code.name})"
        error = KvrelayError(code, message, retry_ms)
        error.lost = lost
        return error

    def _explain_unavailable(self, message: str) -> str:
        if message.startswith(_NOT_CONNECTED):
            if "Connection refused" in message:
                return (
                    f"nothing answers at {self.address}; start a server with `kvrelay serve MODEL`"
                )
            return f"cannot reach {self.address}: {message}"
        if "Socket closed" in message or "Connection reset" in message:
            return f"the connection to {self.address} broke off ({message})"
        return message


def _is_lost(code: grpc.StatusCode, message: str) -> bool:
    return (
        code in _CODES_OF_LOSS
        and not message.startswith(_NOT_CONNECTED)
        and any(words in message for words in _LOST)
    )


def _retry_ms(metadata: Iterable[Any] | None) -> int | None:
    """A value below 0 means never."""
    hint = dict(metadata or ()).get("grpc-retry-pushback-ms", "")
    return int(hint) if isinstance(hint, str) and hint.isdecimal() and len(hint) < 10 else None


def checked_address(address: str) -> str:
    """`address`, if it is HOST:PORT or unix:PATH; else raises KvrelayError."""
    # gRPC takes any text, and a port above 65535 modulo 65536: it would call somebody else.
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or (
        host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536
    ):
        return address
    raise KvrelayError(
        grpc.StatusCode.INVALID_ARGUMENT, f"the address must be HOST:PORT, not {address!r}"
    )
