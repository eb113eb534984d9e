"""gRPC between router and workers: channels, servers and the session stream.

Both worker services serve their one bidirectional stream with `serve_session`; the router dials
with `dial`. Who may have a session is for membership.py.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from kvrelay.tls import grpc_channel, grpc_server, member_name

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 32 << 20
METADATA_BYTES_MAX = 8 << 10  # of one call


class Pings(NamedTuple):
    """How a peer is found that is gone without a word, on an idle stream too."""

    every_ms: int  # while nothing is heard
    answer_ms: int


SESSION_PINGS = Pings(1_000, 1_500)  # between router and workers
# Clients may be far away, or slow. They may ping more often than they are pinged.
PUBLIC_PINGS = Pings(5_000, 5_000)
_PINGED_MS = 500  # a peer that pings more often is sent away
_ROUTER = "kvrelay-router"

Event = TypeVar("Event")
Command = TypeVar("Command")


def make_server(
    interceptors: Sequence[Any] = (),
    rpcs_max: int | None = None,
    request_bytes_max: int = MESSAGE_BYTES_MAX,
    pings: Pings = SESSION_PINGS,
) -> grpc.aio.Server:
    """More than rpcs_max calls at once are refused with RESOURCE_EXHAUSTED."""
    options = [
        *_keepalive(pings),
        ("grpc.http2.min_ping_interval_without_data_ms", _PINGED_MS),
        *_sizes(request_bytes_max),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
        # Without SO_REUSEPORT a port in use is an error, not a silent share of somebody's traffic.
        ("grpc.so_reuseport", 0),
    ]
    return grpc.aio.server(
        interceptors=interceptors, options=options, maximum_concurrent_rpcs=rpcs_max
    )


def listen(
    server: grpc.aio.Server,
    address: str,
    certificates: Path | None,
    *,
    client_certificates: bool = True,
) -> int:
    """The port that `server` serves on from here. With certificates over TLS alone, and clients
    show one too, unless told otherwise.

    Raises:
        RuntimeError: the port is taken.
        CertificatesError: the folder cannot be used.
    """
    if certificates is None:
        return server.add_insecure_port(address)
    shown = grpc_server(certificates, client_certificates=client_certificates)
    return server.add_secure_port(address, shown)


def dial(address: str, certificates: Path | None = None) -> grpc.aio.Channel:
    """To a worker. With certificates over TLS alone, to one that shows a member's."""
    # A pool of its own, so that closing this channel closes this connection.
    options: list[tuple[str, Any]] = [
        *_keepalive(SESSION_PINGS),
        *_sizes(MESSAGE_BYTES_MAX),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if certificates is None:
        return grpc.aio.insecure_channel(address, options=options)
    options.append(("grpc.ssl_target_name_override", member_name(certificates)))
    return grpc.aio.secure_channel(address, grpc_channel(certificates), options=options)


def _keepalive(pings: Pings) -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", pings.every_ms),
        ("grpc.keepalive_timeout_ms", pings.answer_ms),
        ("grpc.http2.ping_timeout_ms", pings.answer_ms),  # or it is a minute, whatever the above
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _sizes(receive_bytes_max: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", receive_bytes_max),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ]


def named(router: str) -> tuple[str, str]:
    """The metadata with which a router says who it is in a session, the same in all of its life."""
    return _ROUTER, router


def router_of(context: Any) -> str:
    """Who it is, as it says; empty when it does not."""
    return str(dict(context.invocation_metadata() or ()).get(_ROUTER, ""))


class RouterSession(Generic[Event]):
    """One router's stream at a worker, as the worker sees it. Compared by identity.

    router: who it is (`router_of`).
    """

    def __init__(self, events_max: int, router: str = "") -> None:
        self.open = True
        self.router = router
        self._events: asyncio.Queue[Event] = asyncio.Queue(events_max)
        self._writer: asyncio.Task[Any] | None = None

    def send(self, event: Event) -> None:
        """Queues an event. A router that has stopped reading loses the session, not us memory."""
        if not self.open:
            return
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("a router does not read its events: its session ends")
            self.end()

    def end(self) -> None:
        """Ends the stream, wherever its writer is waiting."""
        if self.open:
            self.open = False
            if self._writer is not None:
                self._writer.cancel()

    async def write_to(self, context: Any) -> None:
        """Writes events until the session ends or gRPC cancels the call."""
        writer = self._writer = asyncio.current_task()
        assert writer is not None
        try:
            while self.open:
                await context.write(await self._events.get())
        except asyncio.CancelledError:
            if self.open:
                raise
            writer.uncancel()  # by our own `end`: the call is over, and in order


async def serve_session(
    session: RouterSession[Event],
    commands: AsyncIterator[Command],
    context: Any,
    on_command: Callable[[RouterSession[Event], Command], None],
    on_close: Callable[[RouterSession[Event]], None],
) -> None:
    """Hands commands to the worker and writes its events until either side ends the stream.

    Writing, not yielding: gRPC drops an async generator without closing it when a call is
    cancelled, and on_close would wait for the garbage collector.
    """

    async def read() -> None:
        try:
            async for command in commands:
                on_command(session, command)
        except Exception:  # the session ends; the router takes its requests elsewhere
            log.exception("a router's session failed")
        finally:
            session.end()

    reader = asyncio.create_task(read())
    try:
        await session.write_to(context)
    finally:
        session.open = False
        reader.cancel()
        on_close(session)
