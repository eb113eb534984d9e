"""How block bytes get from one pool into another: the part in which transports differ.

A Sender is the prefill worker's half, a Receiver the decode worker's. Everything else about a
link (handshake, leave to write, commit, abort) is in writer.py and listener.py, once for all.
"""

import asyncio
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from kvrelay.kv.pool import KVPool
from kvrelay.transport.frames import FrameSocket, LinkError
from kvrelay.wire import transfer_pb2


def checksum(block: np.ndarray) -> int:
    """xxh3, 64 bits, of one block's bytes `[block_bytes]`."""
    return xxhash.xxh3_64_intdigest(block.data)


class Sender(Protocol):
    """Sends blocks of `pool` into the peer's pool and the Blocks frame that announces them."""

    name: str

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        pool: KVPool,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None: ...

    async def close(self) -> None:
        """Starts no more writes, and returns when none is under way: only then may the socket
        end, since its end is what tells the peer that nobody writes to its pool."""
        ...


class TcpSender:
    """Block bytes follow the frame on the socket."""

    name = "tcp"

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        pool: KVPool,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        sums = await asyncio.to_thread(lambda: [checksum(pool.bytes[block]) for block in source])
        header.checksums.extend(sums)
        payload = (pool.bytes[block].data for block in source)
        await frames.send(transfer_pb2.Frame(blocks=header), payload)

    async def close(self) -> None:
        """Nothing to wait for: the peer itself writes to its pool."""


class ShmSender:
    """Block bytes are written straight into the peer's pool, which is mapped here."""

    name = "shm"

    def __init__(self, fd: int, pool_bytes: int, block_bytes: int) -> None:
        try:
            if os.fstat(fd).st_size != pool_bytes or pool_bytes % block_bytes:
                raise LinkError(f"the peer's pool is not the {pool_bytes} bytes it said")
            mapped = mmap.mmap(fd, pool_bytes)
        finally:
            os.close(fd)
        peer = np.frombuffer(mapped, dtype=np.uint8).reshape(-1, block_bytes)
        self._peer: np.ndarray | None = peer
        self._writes = 0  # under way
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        pool: KVPool,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        if self._peer is None:
            raise LinkError("the link is closed")
        self._writes += 1
        self._quiet.clear()
        try:
            write = asyncio.to_thread(self._write, self._peer, pool, source, target)
            header.checksums.extend(await write)
        finally:
            self._writes -= 1
            if not self._writes:
                self._quiet.set()
        await frames.send(transfer_pb2.Frame(blocks=header))

    @staticmethod
    def _write(
        peer: np.ndarray, pool: KVPool, source: Sequence[int], target: Sequence[int]
    ) -> list[int]:
        sums = []
        for mine, theirs in zip(source, target, strict=True):
            np.copyto(peer[theirs], pool.bytes[mine])  # lets go of the interpreter lock
            sums.append(checksum(pool.bytes[mine]))
        return sums

    async def close(self) -> None:
        self._peer = None  # the mapping goes with its last user
        await self._quiet.wait()


async def receive_tcp(frames: FrameSocket, pool: KVPool, blocks: Sequence[int]) -> None:
    for block in blocks:
        await frames.receive_into(pool.bytes[block].data)


async def receive_shm(frames: FrameSocket, pool: KVPool, blocks: Sequence[int]) -> None:
    """Nothing to do: the peer had written them before it sent the frame."""


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
