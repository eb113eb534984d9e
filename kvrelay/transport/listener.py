"""The decode worker's end of the KV links: accepts writers and checks all that they say.

decode_worker's service owns one Listener. Which transfer may write which blocks is decided by the
TransferBook (decode_worker/handoff.py); this file carries its decisions over sockets. When a link
ends, every transfer it had begun has lost its writer, and the book is told so.
"""

import asyncio
import logging
import socket
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvrelay.config import PROTOCOL_VERSION, WorkerConfig
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool
from kvrelay.transport.frames import FrameSocket, LinkError, tune_tcp
from kvrelay.transport.movers import checksum, receive_shm, receive_tcp, send_fd
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Endpoint, Frame

log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1


class RefusedError(Exception):
    """The book does not allow what a writer asks; the text goes to the writer."""


class TransferBook(Protocol):
    """Decides over transfers. Every method but `lost` raises RefusedError to refuse."""

    def begin(self, transfer_id: int, secret: bytes) -> None: ...

    def expect(self, transfer_id: int, first_index: int, count: int) -> Sequence[int]:
        """The pool blocks that these blocks of the prompt go to."""
        ...

    def received(self, transfer_id: int, count: int) -> None: ...

    def commit(self, transfer_id: int, blocks: int, first_token_id: int) -> None: ...

    def lost(self, transfer_id: int, reason: str) -> None:
        """The writer will write no more, by its own word or because its link ended."""
        ...


class Listener:
    """Listens on a unix socket (shm) and a TCP port (tcp), as far as the config allows."""

    def __init__(
        self, config: WorkerConfig, instance_id: str, pool: KVPool, book: TransferBook
    ) -> None:
        self._config = config
        self._instance_id = instance_id
        self._pool = pool
        self._book = book
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: dict[int, _Link] = {}  # by transfer
        self.endpoints: list[Endpoint] = []
        self._path = Path(config.socket_dir) / f"{instance_id}.sock"

    async def start(self) -> None:
        if self._config.transport in ("auto", "shm"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self._path))
            self._accept_on(sock, "shm", str(self._path))
        if self._config.transport in ("auto", "tcp"):
            sock = socket.socket(socket.AF_INET)
            sock.bind((self._config.host, 0))
            self._accept_on(sock, "tcp", f"{self._config.host}:{sock.getsockname()[1]}")

    def abort(self, transfer_id: int, reason: str) -> None:
        """Asks the writer to stop; the book hears `lost` when it has."""
        link = self._links[transfer_id]
        frame = transfer_pb2.Abort(transfer_id=transfer_id, reason=reason)
        self._spawn(link.send(Frame(abort=frame)))
        loop = asyncio.get_running_loop()
        loop.call_later(self._config.link_reply_ms / 1000, link.give_up, transfer_id)

    def committed(self, transfer_id: int) -> None:
        link = self._links.pop(transfer_id)
        link.transfers.discard(transfer_id)
        frame = transfer_pb2.Committed(transfer_id=transfer_id)
        self._spawn(link.send(Frame(committed=frame)))

    async def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _accept_on(self, sock: socket.socket, transport: str, address: str) -> None:
        sock.listen()
        sock.setblocking(False)
        self._sockets.append(sock)
        self.endpoints.append(Endpoint(transport=transport, address=address))
        self._spawn(self._accept(sock, transport))

    async def _accept(self, sock: socket.socket, transport: str) -> None:
        loop = asyncio.get_running_loop()
        stall_s = self._config.link_reply_ms / 1000
        while True:
            try:
                peer, _ = await loop.sock_accept(sock)
            except OSError as error:  # e.g. no file descriptors left: others may yet be closed
                log.warning("could not take a link: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if transport == "tcp":
                tune_tcp(peer, stall_s)
            frames = FrameSocket(peer, stall_s)
            link = _Link(frames, transport, self._pool, self._book, self._links)
            self._spawn(self._serve(link))

    async def _serve(self, link: "_Link") -> None:
        reason = "the prefill worker closed the link"
        try:
            async with asyncio.timeout(self._config.link_connect_ms / 1000):
                await link.shake_hands(self._instance_id)
            while True:
                await link.serve_one()
        except (LinkError, TimeoutError, OSError) as error:
            reason = str(error) or "no handshake in time"
            log.info("link with %s ended: %s", link.peer, reason)
            # What it may still write goes to its blocks until it has seen the end of the link.
            await link.let_writer_stop()
        finally:
            link.close(reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # A link that breaks is noticed by its reader; whoever sent on it need not say so.
        if not task.cancelled() and not isinstance(task.exception(), LinkError | None):
            log.error("a link task failed", exc_info=task.exception())


class _Link:
    """One writer's connection."""

    def __init__(
        self,
        frames: FrameSocket,
        transport: str,
        pool: KVPool,
        book: TransferBook,
        links: "dict[int, _Link]",
    ) -> None:
        self.peer = "an unknown peer"
        self.transfers: set[int] = set()
        self._refused: set[int] = set()  # of those, the ones whose Aborted is still to come
        self._frames = frames
        self._transport = transport
        self._pool = pool
        self._book = book
        self._links = links
        self.send = frames.send

    async def shake_hands(self, instance_id: str) -> None:
        """Version and layout first: workers that differ are never paired."""
        frame = await self._frames.receive()
        if frame.WhichOneof("body") != "hello":
            raise LinkError("the first frame is not Hello")
        self.peer = frame.hello.instance_id
        problem = _mismatch(frame.hello, self._pool.layout)
        if problem:
            await self.send(Frame(refused=transfer_pb2.Refused(reason=problem)))
            raise LinkError(problem)
        welcome = transfer_pb2.Welcome(instance_id=instance_id, pool_bytes=self._pool.size_bytes)
        await self.send(Frame(welcome=welcome))
        if self._transport == "shm":
            send_fd(self._frames.sock, self._pool.fd)

    async def serve_one(self) -> None:
        """Serves one frame. What the book refuses ends that transfer; a peer that breaks the
        protocol loses the link."""
        frame = await self._frames.receive()
        kind = frame.WhichOneof("body")
        if kind == "begin":
            await self._begin(frame.begin)
        elif kind == "blocks":
            await self._receive(frame.blocks)
        elif kind == "commit":
            await self._commit(frame.commit)
        elif kind in ("abort", "aborted"):
            transfer_id = getattr(frame, kind).transfer_id
            self._end(transfer_id, frame.abort.reason or "the prefill worker let go")
        else:
            raise LinkError(f"an unexpected {kind} frame")

    def give_up(self, transfer_id: int) -> None:
        """The writer should have said Aborted by now. On tcp its link ends: this side is the one
        that writes. On shm it may be stopped in the middle of a copy and go on one day, so its
        blocks stay in quarantine until it answers or dies."""
        if transfer_id not in self.transfers:
            return
        log.warning("%s does not answer Abort", self.peer)
        if self._transport == "tcp":
            self._frames.close()

    async def let_writer_stop(self) -> None:
        if self._transport == "shm" and self.transfers:
            await self._frames.drain()

    def close(self, reason: str) -> None:
        self._frames.close()
        for transfer_id in list(self.transfers):
            self._end(transfer_id, reason)

    async def _begin(self, begin: transfer_pb2.Begin) -> None:
        transfer_id = begin.transfer_id
        if transfer_id in self.transfers:
            raise LinkError("a second Begin of one transfer")
        try:
            self._book.begin(transfer_id, begin.secret)
        except RefusedError as error:
            await self._refuse(transfer_id, str(error))
            return
        self.transfers.add(transfer_id)
        self._links[transfer_id] = self
        await self.send(Frame(begun=transfer_pb2.Begun(transfer_id=transfer_id)))

    async def _receive(self, header: transfer_pb2.Blocks) -> None:
        """Takes the bytes of blocks in, checks their sums, and tells the book."""
        count = len(header.checksums)
        targets = self._targets(header, count)
        take = receive_tcp if self._transport == "tcp" else receive_shm
        await take(self._frames, self._pool, targets)
        bad = await asyncio.to_thread(self._first_bad, targets, list(header.checksums))
        if header.transfer_id not in self.transfers:
            return
        self._book.received(header.transfer_id, count)
        if bad is not None and header.transfer_id not in self._refused:
            reason = f"block {header.first_index + bad} has a wrong checksum"
            await self._refuse(header.transfer_id, reason)

    def _targets(self, header: transfer_pb2.Blocks, count: int) -> Sequence[int]:
        """A frame that names blocks it has no leave for ends the link: on tcp its bytes could
        go nowhere, on shm the writer has shown that it does not keep to what it was given."""
        if header.transfer_id not in self.transfers:
            raise LinkError(f"blocks of transfer {header.transfer_id}, which this link has not")
        try:
            return self._book.expect(header.transfer_id, header.first_index, count)
        except RefusedError as error:
            raise LinkError(str(error)) from error

    def _first_bad(self, targets: Sequence[int], sums: Sequence[int]) -> int | None:
        for index, (block, expected) in enumerate(zip(targets, sums, strict=True)):
            if checksum(self._pool.bytes[block]) != expected:
                return index
        return None

    async def _commit(self, commit: transfer_pb2.Commit) -> None:
        if commit.transfer_id in self._refused:
            return  # it crossed our Abort
        try:
            if commit.transfer_id not in self.transfers:
                raise RefusedError("this link has no such transfer")
            self._book.commit(commit.transfer_id, commit.blocks, commit.first_token_id)
        except RefusedError as error:
            await self._refuse(commit.transfer_id, str(error))

    async def _refuse(self, transfer_id: int, reason: str) -> None:
        if transfer_id in self.transfers:
            self._refused.add(transfer_id)
        await self.send(Frame(abort=transfer_pb2.Abort(transfer_id=transfer_id, reason=reason)))

    def _end(self, transfer_id: int, reason: str) -> None:
        if transfer_id in self.transfers:
            self.transfers.discard(transfer_id)
            self._refused.discard(transfer_id)
            del self._links[transfer_id]
            self._book.lost(transfer_id, reason)


def _mismatch(hello: transfer_pb2.Hello, layout: KVLayout) -> str:
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"link protocol {PROTOCOL_VERSION} here, {hello.protocol_version} there"
    differences = layout.differences(KVLayout.from_wire(hello.layout))
    return f"KV layouts differ: {differences}" if differences else ""
