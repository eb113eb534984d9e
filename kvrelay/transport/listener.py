"""The decode worker's KV links: exposes its pool, accepts writers and shakes hands with them.

decode_worker's service owns one Listener. What happens on a link after its handshake is in
reader.py.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from kvrelay.config import PROTOCOL_VERSION, WorkerConfig
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool
from kvrelay.tls import server_context
from kvrelay.transport.codec import CODECS, wire_dtype
from kvrelay.transport.errors import LinkError, ProtocolError, Rejection
from kvrelay.transport.frames import FrameSocket, tune_tcp
from kvrelay.transport.movers import Receiver, Wire
from kvrelay.transport.nccl_library import NcclLibrary
from kvrelay.transport.nccl_link import NcclReceiver, make_pairs
from kvrelay.transport.reader import ReaderLink, TransferBook
from kvrelay.transport.shm import ShmReceiver, send_fd
from kvrelay.transport.tcp import TcpReceiver
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Endpoint, Frame

log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1


class Listener:
    """Listens on a unix socket (shm) and TCP ports (tcp, nccl), as far as the config allows.

    rejected: what came over links and was not accepted, by reason.
    """

    def __init__(
        self,
        config: WorkerConfig,
        instance_id: str,
        pool: KVPool,
        book: TransferBook,
        nccl: NcclLibrary | None = None,
    ) -> None:
        self.rejected: Counter[Rejection] = Counter()
        self._rejected_logged = 0
        self.endpoints: list[Endpoint] = []
        self._config = config
        self._stall_s = config.link_reply_ms / 1000
        self._connect_s = config.link_connect_ms / 1000
        self._instance_id = instance_id
        self._pool = pool
        self._book = book
        self._tls = server_context(config.certificates) if config.certificates else None
        self._pairs = make_pairs(nccl, "decode", pool, config, self._pair_ended) if nccl else None
        # The newest of each peer; gone with its link.
        self._nccl_receivers: WeakValueDictionary[str, NcclReceiver] = WeakValueDictionary()
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0  # links, shaken hands or not
        self._links: dict[int, ReaderLink] = {}  # by transfer
        self._path = Path(config.socket_dir) / f"{instance_id}.sock"

    async def start(self) -> None:
        if self._pairs is not None:
            self._accept_tcp("nccl")
        if self._config.transport in ("auto", "shm"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self._path))
            self._accept_on(sock, "shm", str(self._path))
        if self._config.transport in ("auto", "tcp"):
            self._accept_tcp("tcp")

    def abort(self, transfer_id: int, reason: str) -> None:
        """Asks the writer to stop; the book hears `lost` when it has."""
        link = self._links[transfer_id]
        frame = transfer_pb2.Abort(transfer_id=transfer_id, reason=reason)
        self._spawn(link.send(Frame(abort=frame)))
        asyncio.get_running_loop().call_later(self._stall_s, link.give_up, transfer_id)

    def committed(self, transfer_id: int) -> None:
        link = self._links.pop(transfer_id)
        link.forget(transfer_id)
        frame = transfer_pb2.Committed(transfer_id=transfer_id)
        self._spawn(link.send(Frame(committed=frame)))

    def log_rejected(self) -> None:
        """Says by reason what has been rejected so far, if that is more than the last time."""
        if self.rejected.total() > self._rejected_logged:
            self._rejected_logged = self.rejected.total()
            counts = ", ".join(f"{reason.value} {n}" for reason, n in self.rejected.most_common())
            log.info("rejected on KV links so far: %s", counts)

    async def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pairs is not None:
            await self._pairs.close()
        self._path.unlink(missing_ok=True)

    def _accept_tcp(self, transport: str) -> None:
        sock = socket.socket(socket.AF_INET)
        sock.bind((self._config.host, 0))
        self._accept_on(sock, transport, f"{self._config.host}:{sock.getsockname()[1]}")

    def _accept_on(self, sock: socket.socket, transport: str, address: str) -> None:
        sock.listen()
        sock.setblocking(False)
        self._sockets.append(sock)
        self.endpoints.append(Endpoint(transport=transport, address=address))
        self._spawn(self._accept(sock, transport))

    async def _accept(self, sock: socket.socket, transport: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(sock)
            except OSError as error:  # e.g. no file descriptors left: others may yet be closed
                log.warning("could not take a link: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._open >= self._config.links_max:
                log.warning("%d links are open: one more is turned away", self._open)
                peer.close()
                continue
            self._open += 1
            self._spawn(self._serve(FrameSocket(peer, self._stall_s), transport))

    async def _serve(self, frames: FrameSocket, transport: str) -> None:
        link: ReaderLink | None = None
        reason = "the prefill worker closed the link"
        try:
            if transport != "shm":
                tune_tcp(frames.channel.sock, self._stall_s)
            async with asyncio.timeout(self._connect_s):
                link = await self._shake_hands(frames, transport)
            prove_by_s = asyncio.get_running_loop().time() + self._connect_s
            while True:
                async with asyncio.timeout_at(None if link.proven else prove_by_s):
                    await link.serve_one()
                await asyncio.sleep(0)  # a peer that always has more must not keep the loop
        except Exception as error:
            reason = str(error) or "no word in time"
            if not isinstance(error, LinkError | TimeoutError | OSError):
                log.exception("a KV link failed")
            if isinstance(error, ProtocolError):
                self.rejected[error.rejection] += 1
            elif link is None:
                self.rejected[Rejection.HANDSHAKE] += 1
            log.info("link with %s ended: %s", link.peer if link else "an unknown peer", reason)
            if link:
                await link.let_writer_stop()
        finally:
            self._open -= 1
            if link:
                link.close(reason)
            frames.close()

    async def _shake_hands(self, frames: FrameSocket, transport: str) -> ReaderLink:
        """Version and layout first: workers that differ are never paired."""
        if self._tls and transport != "shm":
            try:
                await frames.channel.start_tls(self._tls, server_side=True)
            except LinkError as error:
                raise ProtocolError(Rejection.HANDSHAKE, str(error)) from error
        frame = await frames.receive()
        if frame.WhichOneof("body") != "hello":
            raise ProtocolError(Rejection.HANDSHAKE, "the first frame is not Hello")
        hello = frame.hello
        problem = _mismatch(hello, self._pool.layout)
        if problem:
            await frames.send(Frame(refused=transfer_pb2.Refused(reason=problem)))
            raise ProtocolError(Rejection.HANDSHAKE, problem)
        theirs = KVLayout.from_wire(hello.layout)
        dtype = wire_dtype(hello.codec, theirs, self._pool.layout, transport)
        checksums = hello.checksums or self._config.checksums
        welcome = transfer_pb2.Welcome(
            instance_id=self._instance_id,
            pool_bytes=self._pool.size_bytes,
            wire_dtype=dtype,
            checksums=checksums,
        )
        await frames.send(Frame(welcome=welcome))
        wire = Wire(replace(self._pool.layout, dtype=dtype), checksums)
        if transport == "shm":
            send_fd(frames.channel.sock, self._pool.fd)
        receiver = self._receiver(transport, wire, hello.instance_id, frames)
        return ReaderLink(
            hello.instance_id, frames, receiver, self._book, self._links, self.rejected
        )

    def _receiver(self, transport: str, wire: Wire, peer: str, frames: FrameSocket) -> Receiver:
        if transport == "shm":
            return ShmReceiver(self._pool, wire)
        if transport == "tcp":
            return TcpReceiver(self._pool, wire)
        assert self._pairs is not None
        deadline_s = self._config.nccl_operation_ms / 1000
        of_peers = self._nccl_receivers
        return NcclReceiver(self._pool, wire, peer, self._pairs, frames, deadline_s, of_peers)

    def _pair_ended(self, peer: str, epoch: int, reason: str) -> None:
        receiver = self._nccl_receivers.get(peer)
        if receiver is not None:
            receiver.tell(epoch, reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # A link that breaks is noticed by its reader; whoever sent on it need not say so.
        if not task.cancelled() and not isinstance(task.exception(), LinkError | None):
            log.error("a link task failed", exc_info=task.exception())


def _mismatch(hello: transfer_pb2.Hello, layout: KVLayout) -> str:
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"link protocol {PROTOCOL_VERSION} here, {hello.protocol_version} there"
    if hello.codec not in CODECS:
        return f"wire codecs {', '.join(CODECS)} here, {hello.codec!r} there"
    mismatch = layout.mismatch(KVLayout.from_wire(hello.layout))
    return f"KV layouts differ: {mismatch}" if mismatch else ""
