"""How block bytes get from one pool into another: the part in which shm and tcp differ.

A Sender is the prefill worker's half, a Receiver the decode worker's. Everything else about a
link (handshake, leave to write, resending, commit, abort) is in writer.py and listener.py, once
for all.
"""

import asyncio
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from kvrelay.engine.kernels.stream import stream_copy
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool
from kvrelay.transport.codec import encode, transcode
from kvrelay.transport.errors import LinkError
from kvrelay.transport.frames import FrameSocket
from kvrelay.wire import transfer_pb2


@dataclass(frozen=True)
class Wire:
    """How blocks travel on one link, as its handshake agreed."""

    layout: KVLayout
    checksums: bool


class Sender(Protocol):
    """Sends blocks of our pool into the peer's, and the Blocks frame that announces them."""

    name: str
    wire: Wire

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None: ...

    async def close(self) -> None:
        """Starts no more writes, and returns when none is under way: only then may the socket
        end, since its end is what tells the peer that nobody writes to its pool."""
        ...


class Receiver(Protocol):
    """Takes the blocks of a Blocks frame in."""

    wire: Wire
    peer_writes: bool  # straight into our pool, so that it must stop before blocks are reused

    async def receive(
        self, frames: FrameSocket, header: transfer_pb2.Blocks, target: Sequence[int]
    ) -> list[int]:
        """Returns when they are in the pool: which of them, counted from 0, are not what was
        sent."""
        ...


def checksum(block: np.ndarray) -> int:
    """xxh3, 64 bits, of one block's bytes `[block_bytes]`."""
    return xxhash.xxh3_64_intdigest(block.data)


class TcpSender:
    """Block bytes follow the frame on the socket."""

    name = "tcp"

    def __init__(self, pool: KVPool, wire: Wire) -> None:
        self.wire = wire
        self._pool = pool

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        blocks = await asyncio.to_thread(self._prepare, header, source)
        await frames.send(transfer_pb2.Frame(blocks=header), [block.data for block in blocks])

    def _prepare(self, header: transfer_pb2.Blocks, source: Sequence[int]) -> Sequence[np.ndarray]:
        own = [self._pool.bytes[block] for block in source]
        blocks = encode(own, self._pool.layout, self.wire.layout)
        if self.wire.checksums:
            header.checksums.extend(map(checksum, blocks))
        return blocks

    async def close(self) -> None:
        """Nothing to wait for: the peer itself writes to its pool."""


class TcpReceiver:
    """Block bytes go from the socket into the pool, or are decoded into it."""

    peer_writes = False

    def __init__(self, pool: KVPool, wire: Wire) -> None:
        self.wire = wire
        self._pool = pool

    async def receive(
        self, frames: FrameSocket, header: transfer_pb2.Blocks, target: Sequence[int]
    ) -> list[int]:
        own = [self._pool.bytes[block] for block in target]
        same = self.wire.layout.dtype == self._pool.layout.dtype
        blocks = own
        if not same:
            blocks = list(np.empty((len(own), self.wire.layout.block_bytes), np.uint8))
        await frames.receive_into([block.data for block in blocks])
        bad = wrong_blocks(self.wire, header, blocks)
        if not same:
            await asyncio.to_thread(self._decode, blocks, own)
        return bad

    def _decode(self, blocks: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> None:
        for block, target in zip(blocks, own, strict=True):
            transcode(block, self.wire.layout, target, self._pool.layout)


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
        for mine, theirs in zip(source, target, strict=True):
            (block,) = encode([self._pool.bytes[mine]], self._pool.layout, self.wire.layout)
            stream_copy(block, peer[theirs])  # first: then it is in the caches for the checksum
            if self.wire.checksums:
                header.checksums.append(checksum(block))

    async def close(self) -> None:
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
        return wrong_blocks(self.wire, header, [self._pool.bytes[b] for b in target])


def wrong_blocks(
    wire: Wire, header: transfer_pb2.Blocks, blocks: Sequence[np.ndarray]
) -> list[int]:
    """Positions of those whose checksum is not the header's.

    On the event loop: a frame takes less than a millisecond, and a thread's round trip a good part
    of that.
    """
    if not wire.checksums:
        return []
    pairs = enumerate(zip(blocks, header.checksums, strict=True))
    return [position for position, (block, sum_) in pairs if checksum(block) != sum_]


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
