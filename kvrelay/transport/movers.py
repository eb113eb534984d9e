"""What every way of moving blocks must do, and what they share.

A Sender is the prefill worker's half, a Receiver the decode worker's; shm.py, tcp.py and
nccl_link.py have one of each. Everything else about a link (handshake, leave to write, resending,
commit, abort) is in writer.py, listener.py and reader.py, once for all.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool
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

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        """A frame that not every kind of link knows; LinkError when this one does not."""
        ...

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

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        """A frame that not every kind of link knows; ProtocolError when this one does not."""
        ...

    async def quiet(self, frames: FrameSocket) -> None:
        """The link is broken. Returns when nothing is written to our pool through it any more."""
        ...


def checksum(block: np.ndarray) -> int:
    """xxh3, 64 bits, of one block's bytes `[block_bytes]`."""
    return xxhash.xxh3_64_intdigest(block.data)


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


def unexpected(frame: transfer_pb2.Frame) -> str:
    return f"an unexpected {frame.WhichOneof('body')} frame"


async def to_device(pool: KVPool, blocks: Sequence[int]) -> None:
    """What has arrived in host memory becomes visible to the engine. Nothing to do on a CPU."""
    if pool.staged:
        await asyncio.to_thread(pool.to_device, blocks)
