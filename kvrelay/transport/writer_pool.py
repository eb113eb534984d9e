"""The KV links of one prefill worker: finds a way to a decode worker and shakes hands.

prefill_worker's service calls WriterPool.begin for a ticket and gets a Transfer to push through.
"""

import asyncio
import socket
from dataclasses import replace
from weakref import WeakValueDictionary

from kvrelay.config import PROTOCOL_VERSION, WorkerConfig
from kvrelay.failpoints import Failpoints
from kvrelay.kv.layout import DTYPE_BYTES
from kvrelay.kv.pool import KVPool
from kvrelay.tls import client_context
from kvrelay.transport.errors import LinkError
from kvrelay.transport.frames import FrameSocket, tune_tcp
from kvrelay.transport.movers import Sender, Wire
from kvrelay.transport.nccl_library import NcclLibrary
from kvrelay.transport.nccl_link import NcclSender, make_pairs
from kvrelay.transport.shm import ShmSender, receive_fd
from kvrelay.transport.tcp import TcpSender
from kvrelay.transport.writer import Transfer, WriterLink
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Frame, Ticket


class WriterPool:
    """The links of one prefill worker, made when a ticket first needs them."""

    def __init__(
        self,
        config: WorkerConfig,
        instance_id: str,
        pool: KVPool,
        nccl: NcclLibrary | None = None,
    ) -> None:
        self._config = config
        self._failpoints = Failpoints(config.failpoints)
        self._instance_id = instance_id
        self._pool = pool
        self._tls = client_context(config.certificates) if config.certificates else None
        self._pairs = make_pairs(nccl, "prefill", pool, config, self._pair_ended) if nccl else None
        # The newest to each peer; gone with its link.
        self._nccl_senders: WeakValueDictionary[str, NcclSender] = WeakValueDictionary()
        self._links: dict[tuple[str, str], asyncio.Task[WriterLink]] = {}

    async def begin(self, ticket: Ticket) -> Transfer:
        """A transfer over the first of the ticket's endpoints that works from here.

        Raises:
            LinkError: none does, or the decode worker refuses; says what was tried.
        """
        tried = []
        for endpoint in ticket.endpoints:
            if self._config.transport not in ("auto", endpoint.transport):
                continue
            if endpoint.transport == "nccl" and self._pairs is None:
                continue
            try:
                link = await self._link(ticket.decode_instance_id, endpoint)
            except LinkError as error:
                tried.append(f"{endpoint.transport}: {error}")
                continue
            return await link.begin(ticket, self._config.link_reply_ms / 1000)
        raise LinkError(f"no way to {ticket.decode_instance_id}: {'; '.join(tried) or 'none fits'}")

    async def close(self) -> None:
        links, self._links = list(self._links.values()), {}
        for connecting in links:
            connecting.cancel()
        for link in await asyncio.gather(*links, return_exceptions=True):
            if isinstance(link, WriterLink):
                await link.close()
        if self._pairs is not None:
            await self._pairs.close()

    async def _link(self, instance_id: str, endpoint: transfer_pb2.Endpoint) -> WriterLink:
        """The one link there is, or the one attempt to make it, shared by all who need it."""
        key = (instance_id, endpoint.transport)
        if key not in self._links or not _usable(self._links[key]):
            self._links = {k: link for k, link in self._links.items() if _usable(link)}
            self._links[key] = asyncio.create_task(self._connect(instance_id, endpoint))
        return await asyncio.shield(self._links[key])

    async def _connect(self, instance_id: str, endpoint: transfer_pb2.Endpoint) -> WriterLink:
        frames = self._frames_for(endpoint)
        try:
            async with asyncio.timeout(self._config.link_connect_ms / 1000):
                await self._open(frames, endpoint)
                return await self._shake_hands(frames, instance_id, endpoint.transport)
        except (OSError, TimeoutError, LinkError) as error:
            frames.close()
            raise LinkError(f"{endpoint.address}: {str(error) or 'no answer in time'}") from error
        except asyncio.CancelledError:
            frames.close()
            raise

    # The next three are all that a link needs of the system: the simulation has its own.

    def _frames_for(self, endpoint: transfer_pb2.Endpoint) -> FrameSocket:
        stall_s = self._config.link_reply_ms / 1000
        return FrameSocket(_socket_for(endpoint, stall_s), stall_s)

    async def _open(self, frames: FrameSocket, endpoint: transfer_pb2.Endpoint) -> None:
        """Connects. Raises OSError or LinkError."""
        await _dial(frames.channel.sock, endpoint)
        if self._tls and endpoint.transport != "shm":
            await frames.channel.start_tls(self._tls, server_side=False)

    async def _sender(
        self, transport: str, wire: Wire, frames: FrameSocket, welcome: transfer_pb2.Welcome
    ) -> Sender:
        if transport == "nccl":
            return self._nccl_sender(welcome.instance_id, wire, frames)
        if transport == "tcp":
            return TcpSender(self._pool, wire)
        fd = await receive_fd(frames.channel.sock)
        return ShmSender(self._pool, wire, fd, welcome.pool_bytes)

    async def _shake_hands(
        self, frames: FrameSocket, instance_id: str, transport: str
    ) -> WriterLink:
        hello = transfer_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            instance_id=self._instance_id,
            layout=self._pool.layout.to_wire(),
            codec=self._config.wire_codec,
            checksums=self._config.checksums,
        )
        await frames.send(Frame(hello=hello))
        answer = await frames.receive()
        if answer.WhichOneof("body") == "refused":
            raise LinkError(answer.refused.reason)
        welcome = answer.welcome
        if welcome.instance_id != instance_id:
            raise LinkError(f"{welcome.instance_id} answers there, not {instance_id}")
        if welcome.wire_dtype not in DTYPE_BYTES:
            raise LinkError(f"KV blocks as {welcome.wire_dtype!r} are asked for, unknown here")
        wire = Wire(replace(self._pool.layout, dtype=welcome.wire_dtype), welcome.checksums)
        sender = await self._sender(transport, wire, frames, welcome)
        return WriterLink(frames, sender, self._config.push_bytes_max, self._failpoints)

    def _nccl_sender(self, peer: str, wire: Wire, frames: FrameSocket) -> NcclSender:
        assert self._pairs is not None
        deadline_s = self._config.nccl_operation_ms / 1000
        sender = NcclSender(self._pool, wire, peer, self._pairs, frames, deadline_s)
        self._nccl_senders[peer] = sender
        return sender

    def _pair_ended(self, peer: str, epoch: int, reason: str) -> None:
        sender = self._nccl_senders.get(peer)
        if sender is not None:
            sender.tell(epoch, reason)


def _usable(connecting: asyncio.Task[WriterLink]) -> bool:
    """Whether a link is there, or may still come."""
    if not connecting.done():
        return True
    return (
        not connecting.cancelled()
        and not connecting.exception()
        and (not connecting.result().closed)
    )


def _socket_for(endpoint: transfer_pb2.Endpoint, stall_s: float) -> socket.socket:
    if endpoint.transport == "shm":
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.socket(socket.AF_INET)
        tune_tcp(sock, stall_s)
    sock.setblocking(False)
    return sock


async def _dial(sock: socket.socket, endpoint: transfer_pb2.Endpoint) -> None:
    loop = asyncio.get_running_loop()
    if endpoint.transport == "shm":
        await loop.sock_connect(sock, endpoint.address)
    else:
        host, _, port = endpoint.address.rpartition(":")
        await loop.sock_connect(sock, (host, int(port)))
