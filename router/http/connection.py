"""Owns one HTTP connection's limits that uvicorn does not have: how many connections there may be,
how long one may be open without a whole request head, and how long a client may read nothing."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from kvrelay.config import RouterConfig
from router.http.errors import HttpError, invalid, overloaded
from router.refusals import RETRY_HINT_MS


class Connection(H11Protocol):
    """Made by uvicorn for every client that connects."""

    # Set on a subclass, by the server that makes connections of it.
    connections_max: int
    head_ms: int
    write_ms: int

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            error = overloaded(f"{self.connections_max} connections are open", RETRY_HINT_MS)
            self._refuse(error)
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client is behind: what answers it waits from now on."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_ms / 1000, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # A plain close would wait for ever for a client that has not read the last answer.
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(invalid("this is not HTTP/1.1, or its head is too large"))

    def _refuse(self, error: HttpError) -> None:
        body = json.dumps(error.body).encode()
        head = [
            f"HTTP/1.1 {error.status.value} {error.status.phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in error.headers.items()),
        ]
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    def _watch_head(self) -> None:
        """More data does not make the time longer, or a head could come a byte a second."""
        if self._is_busy:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_ms / 1000, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._is_busy:
            self.transport.abort()

    @property
    def _is_busy(self) -> bool:
        """A request is under way."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def limited(config: RouterConfig) -> type[Connection]:
    """A Connection with its limits: uvicorn makes them itself and passes no more than its own."""
    limits = {
        "connections_max": config.http_connections_max,
        "head_ms": config.http_idle_ms,
        "write_ms": config.http_write_ms,
    }
    return type("LimitedConnection", (Connection,), limits)
