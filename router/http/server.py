"""The HTTP server: uvicorn on the router's event loop, started and stopped by router/main.py."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from kvrelay.config import RouterConfig
from router.exposure import listen_address
from router.http.acceptor import Acceptor
from router.http.connection import Connection, limited

_BACKLOG = 2048
# For the ends of streams whose requests are over; uvicorn takes whole seconds.
_GOODBYE_S = 1


class HttpServer:
    """`address` is host:port, from `start` on."""

    def __init__(self, app: ASGIApp, config: RouterConfig, tls: ssl.SSLContext | None = None):
        """tls: clients must speak TLS with it; None: plain HTTP."""
        self.address = ""
        self._config = config
        self._server = _Server(_settings(app, config))
        self._acceptor = Acceptor(
            self._connection, lambda: len(self._server.server_state.connections), config, tls
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises OSError when the port cannot be had."""
        listener = _listen(self._config.host, self._config.http_port)
        self.address = listen_address(self._config.host, listener.getsockname()[1])
        self._server.config.load()
        self._task = asyncio.create_task(self._server.serve(sockets=[]))
        self._acceptor.start(listener)

    async def stop(self) -> None:
        """Lets answers that are being sent go out, for a moment; then cancels their requests."""
        if self._task is None:
            return
        await self._acceptor.close()
        self._server.should_exit = True
        await self._task
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)

    def _connection(self) -> asyncio.Protocol:
        """As uvicorn makes it for its own listeners."""
        config = self._server.config
        made = config.http_protocol_class
        assert issubclass(made, Connection)
        return made(config, self._server.server_state, app_state={})


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's."""
        yield


def _settings(app: ASGIApp, config: RouterConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited(config),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(1, config.http_idle_ms // 1000),
        timeout_graceful_shutdown=_GOODBYE_S,
        h11_max_incomplete_event_size=config.http_header_bytes_max,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Without SO_REUSEPORT: a port in use is an error, not a silent share of its traffic."""
    # gRPC takes either of these for all addresses, IPv4 and IPv6.
    both = host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6()
    bound = "::" if both else host
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    try:
        return socket.create_server(
            (bound, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise OSError(f"HTTP port {host}:{port} {why}; choose another with --http-port") from error
