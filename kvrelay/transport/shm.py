"""Sender and receiver of shm: the writer puts blocks into the decode worker's pool, and says so."""

import asyncio
import mmap
import os
import socket
import threading
from collections.abc import Sequence

import numpy as np
import xxhash

from kvrelay.engine.kernels.stream import stream_copy
from kvrelay.kv.pool import KVPool, touch_pages
from kvrelay.transport.codec import encode
from kvrelay.transport.errors import LinkError, ProtocolError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.movers import Wire, to_device, unexpected, wrong_blocks
from kvrelay.wire import transfer_pb2

_PIECE_BYTES = 360 << 10  # half of a core's own cache


class ShmSender:
    """Block bytes are written straight into the peer's pool, which is mapped here."""

    name = "shm"

    def __init__(self, pool: KVPool, wire: Wire, fd: int, peer_bytes: int) -> None:
        """fd: of the peer's pool, ours from now on."""
        block_bytes = wire.layout.block_bytes
        try:
            if os.fstat(fd).st_size != peer_bytes or peer_bytes % block_bytes:
                raise LinkError(f"the peer's pool is not the {peer_bytes} bytes it said")
            mapped = mmap.mmap(fd, peer_bytes)
        finally:
            os.close(fd)
        self.wire = wire
        self._pool = pool
        peer = np.frombuffer(mapped, dtype=np.uint8).reshape(-1, block_bytes)
        self._peer: np.ndarray | None = peer
        # The pages are there, but not yet in our tables. The thread keeps the mapping alive.
        self._closed = threading.Event()
        touching = threading.Thread(target=touch_pages, args=[peer, self._closed], daemon=True)
        touching.start()
        self._writes = 0  # under way
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        if self._peer is None:
            raise LinkError("the link is closed")
        self._writes += 1
        self._quiet.clear()
        try:
            await asyncio.to_thread(self._write, self._peer, header, source, target)
        finally:
            self._writes -= 1
            if not self._writes:
                self._quiet.set()
        await frames.send(transfer_pb2.Frame(blocks=header))

    def _write(
        self,
        peer: np.ndarray,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        if self._pool.staged:
            self._pool.to_host(source)
        for mine, theirs in zip(source, target, strict=True):
            (block,) = encode([self._pool.bytes[mine]], self._pool.layout, self.wire.layout)
            if self.wire.checksums:
                header.checksums.append(_copy_and_sum(block, peer[theirs]))
            else:
                stream_copy(block, peer[theirs])

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        raise LinkError(unexpected(frame))

    async def close(self) -> None:
        self._closed.set()
        self._peer = None  # the mapping goes with its last user
        await self._quiet.wait()


class ShmReceiver:
    """The peer had written the blocks before it sent the frame."""

    peer_writes = True

    def __init__(self, pool: KVPool, wire: Wire) -> None:
        self.wire = wire
        self._pool = pool

    async def receive(
        self, frames: FrameSocket, header: transfer_pb2.Blocks, target: Sequence[int]
    ) -> list[int]:
        wrong = wrong_blocks(self.wire, header, [self._pool.bytes[b] for b in target])
        await to_device(self._pool, target)
        return wrong

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        raise ProtocolError(Rejection.MALFORMED, unexpected(frame))

    async def quiet(self, frames: FrameSocket) -> None:
        """What the writer still writes goes to its blocks until it has seen the link's end."""
        await frames.channel.drain()


def _copy_and_sum(block: np.ndarray, target: np.ndarray) -> int:
    """target = block; its `checksum`, made of pieces that are still in the core's cache."""
    total = xxhash.xxh3_64()
    for start in range(0, len(block), _PIECE_BYTES):
        piece = block[start : start + _PIECE_BYTES]
        stream_copy(piece, target[start : start + _PIECE_BYTES])
        total.update(piece.data)
    return total.intdigest()


def send_fd(sock: socket.socket, fd: int) -> None:
    """One byte with a file descriptor; follows Welcome on shm."""
    socket.send_fds(sock, [b"F"], [fd])


async def receive_fd(sock: socket.socket) -> int:
    """The other half of send_fd. The caller sets the deadline."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock.fileno())
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    if not fds:
        raise LinkError("no file descriptor came with Welcome")
    os.set_inheritable(fds[0], False)
    return fds[0]
