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

    def close(self) -> None: ...


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

    def close(self) -> None:
        pass


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

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        pool: KVPool,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        header.checksums.extend(await asyncio.to_thread(self._write, pool, source, target))
        await frames.send(transfer_pb2.Frame(blocks=header))

    def _write(self, pool: KVPool, source: Sequence[int], target: Sequence[int]) -> list[int]:
        peer = self._peer
        if peer is None:
            raise LinkError("the link is closed")
        sums = []
        for mine, theirs in zip(source, target, strict=True):
            np.copyto(peer[theirs], pool.bytes[mine])  # lets go of the interpreter lock
            sums.append(checksum(pool.bytes[mine]))
        return sums

    def close(self) -> None:
        self._peer = None  # the mapping goes with its last user


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
