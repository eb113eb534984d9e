"""gRPC between router and workers: channels, servers, the cluster key, and the session stream.

Both worker services serve their one bidirectional stream with `serve_session`; the router dials
with `dial`. The cluster key is a secret that only the processes of one cluster hold.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc

log = logging.getLogger(__name__)

CLUSTER_KEY_HEADER = "kvrelay-cluster-key"
MESSAGE_BYTES_MAX = 32 << 20

# Pings find a peer that is gone without a word, on an idle stream too.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
]
_SIZES = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]

Event = TypeVar("Event")
Command = TypeVar("Command")


def new_cluster_key() -> str:
    return secrets.token_hex(32)


def make_server(interceptors: Sequence[Any] = (), rpcs_max: int | None = None) -> grpc.aio.Server:
    """More than rpcs_max calls at once are refused with RESOURCE_EXHAUSTED."""
    # Without SO_REUSEPORT a port in use is an error, not a silent share of somebody's traffic.
    options = [*_KEEPALIVE, *_SIZES, ("grpc.so_reuseport", 0)]
    return grpc.aio.server(
        interceptors=interceptors, options=options, maximum_concurrent_rpcs=rpcs_max
    )


def dial(address: str) -> grpc.aio.Channel:
    # A pool of its own, so that closing this channel closes this connection.
    options = [*_KEEPALIVE, *_SIZES, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options=options)


def credentials(cluster_key: str) -> list[tuple[str, str]]:
    """The metadata that `serve_session` asks for."""
    return [(CLUSTER_KEY_HEADER, cluster_key)]


async def require_cluster_key(context: Any, cluster_key: str) -> None:
    """Ends the call with UNAUTHENTICATED unless the caller holds the cluster's key."""
    given = dict(context.invocation_metadata() or ()).get(CLUSTER_KEY_HEADER, "")
    if not hmac.compare_digest(str(given).encode(), cluster_key.encode()):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster key is missing or wrong")


class RouterSession(Generic[Event]):
    """One router's stream at a worker, as the worker sees it. Compared by identity."""

    def __init__(self, events_max: int) -> None:
        self.open = True
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
