"""Owns the accepting of HTTP connections, from the listener to the end of the TLS handshake.

By itself the event loop would accept any number, and uvicorn would hear of each only when its
handshake is done: who never begins one would be under no limit. Made by router/http/server.py.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from kvrelay.config import RouterConfig

log = logging.getLogger(__name__)

_AGAIN_S = 0.5  # after an error, such as too many open files


class Acceptor:
    """connected: how many connections have their protocol; with TLS, those that open count too."""

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        connected: Callable[[], int],
        config: RouterConfig,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._make_protocol = make_protocol
        self._connected = connected
        self._connections_max = config.http_connections_max
        self._tls = tls
        self._tls_s = config.http_tls_ms / 1000 if tls else None
        self._opening: dict[asyncio.Task[None], socket.socket] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    def start(self, listener: socket.socket) -> None:
        """The listener is ours from here on."""
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener))

    async def close(self) -> None:
        """Nobody comes in any more; who is in a handshake is cut off."""
        if self._accepting is None or self._listener is None:
            return
        opening = dict(self._opening)
        for task in (self._accepting, *opening):
            task.cancel()
        await asyncio.gather(self._accepting, *opening, return_exceptions=True)
        for task, connection in opening.items():
            if task.cancelled():
                connection.close()
        self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.error("an HTTP connection cannot be accepted: %s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            if self._tls and len(self._opening) + self._connected() >= self._connections_max:
                connection.close()  # to tell it why would take a handshake
                continue
            opening = asyncio.create_task(self._open(connection))
            self._opening[opening] = connection
            opening.add_done_callback(self._opening.pop)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._tls_s,
                ssl_shutdown_timeout=self._tls_s,
            )
        except OSError as error:  # the client's doing: no handshake, another certificate
            log.debug("an HTTP connection was not opened: %s", error)
        except Exception:
            log.exception("an HTTP connection was not opened")
