"""Sender and receiver of tcp: the bytes of blocks follow their frame on the socket."""

import asyncio
from collections.abc import Sequence

import numpy as np
import torch

from kvrelay.kv.pool import KVPool
from kvrelay.transport.codec import encode, transcode
from kvrelay.transport.errors import LinkError, ProtocolError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.movers import Wire, checksum, to_device, unexpected, wrong_blocks
from kvrelay.wire import transfer_pb2


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
        if self._pool.staged or self.wire.layout.dtype != self._pool.layout.dtype:
            blocks = await asyncio.to_thread(self._prepare, header, source)
        else:  # checksums alone take less than a thread's round trip
            blocks = self._prepare(header, source)
        await frames.send(transfer_pb2.Frame(blocks=header), [block.data for block in blocks])

    def _prepare(self, header: transfer_pb2.Blocks, source: Sequence[int]) -> Sequence[np.ndarray]:
        if self._pool.staged:
            self._pool.to_host(source)
        own = [self._pool.bytes[block] for block in source]
        blocks = encode(own, self._pool.layout, self.wire.layout)
        if self.wire.checksums:
            header.checksums.extend(map(checksum, blocks))
        return blocks

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        raise LinkError(unexpected(frame))

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
        wrong = wrong_blocks(self.wire, header, blocks)
        if not same:
            await asyncio.to_thread(self._decode, blocks, own)
        await to_device(self._pool, target)
        return wrong

    async def on_frame(self, frame: transfer_pb2.Frame) -> None:
        raise ProtocolError(Rejection.MALFORMED, unexpected(frame))

    async def quiet(self, frames: FrameSocket) -> None:
        """Nothing to wait for: this side is the one that writes."""

    def _decode(self, blocks: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> None:
        for block, target in zip(blocks, own, strict=True):
            ours, theirs = torch.from_numpy(target), torch.from_numpy(block)
            transcode(theirs, self.wire.layout, ours, self._pool.layout)
