"""An address at which nobody answers, for as long as it is held."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_address() -> Iterator[str]:
    """host:port, bound and not listened at: connections are refused, and nobody else gets it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
