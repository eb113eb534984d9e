"""Both ends of an NCCL pair on one event loop, over the double or over NCCL itself."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from nccl_double import DoubleNccl

from kvrelay.transport.nccl_library import NcclLibrary, NvidiaNccl, Region
from kvrelay.transport.nccl_pair import NcclPair

# Only a broken test waits this long.
DEADLINE_S = 20.0
ABORT_S = 10.0


class Memory:
    """Bytes on a device (or the host, for the double), with their regions."""

    def __init__(self, data: bytes, device: str) -> None:
        self._tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)

    def regions(self, *sizes: int) -> list[Region]:
        """Of those sizes, one behind the other; all of it without sizes."""
        at, found = self._tensor.data_ptr(), []
        for size in sizes or (len(self._tensor),):
            found.append(Region(at, size))
            at += size
        return found

    def read(self) -> bytes:
        return bytes(self._tensor.cpu().numpy())


@dataclass
class Ends:
    library: NcclLibrary
    devices: tuple[int, int]  # by rank
    pairs: list[NcclPair] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)  # a region keeps no memory alive

    def memory(self, rank: int, data: bytes) -> Memory:
        real = isinstance(self.library, NvidiaNccl)
        memory = Memory(data, f"cuda:{self.devices[rank]}" if real else "cpu")
        self.memories.append(memory)
        if real:
            torch.cuda.synchronize(self.devices[rank])
        return memory

    def end(self, unique_id: bytes, rank: int, **changes: Any) -> NcclPair:
        device = self.devices[rank]
        options = {"abort_s": ABORT_S, **changes}
        self.pairs.append(NcclPair(self.library, unique_id, rank, device, **options))
        return self.pairs[-1]

    async def both(self, **changes: Any) -> tuple[NcclPair, NcclPair]:
        unique_id = self.library.unique_id()
        prefill, decode = (self.end(unique_id, rank, **changes) for rank in (0, 1))
        await asyncio.gather(prefill.opened(DEADLINE_S), decode.opened(DEADLINE_S))
        return prefill, decode

    async def close(self) -> None:
        if isinstance(self.library, DoubleNccl):
            self.library.faults.hang.clear()
            self.library.faults.stream_hangs = False
            self.library.faults.release.set()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(pair.close(2.0) for pair in self.pairs))
            if isinstance(self.library, DoubleNccl):
                await asyncio.gather(*(pair.wait_closed() for pair in self.pairs))
                for communicator in self.library.communicators:
                    communicator.end()


def double_ends() -> Ends:
    return Ends(DoubleNccl(), (0, 0))


@contextlib.asynccontextmanager
async def longest_stall() -> AsyncIterator[Callable[[], float]]:
    """Gives a function that tells the longest time, in seconds, that the loop did not come round
    since; nothing else of the test may be slow."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            worst = max(worst, time.perf_counter() - before - 0.002)

    task = asyncio.ensure_future(watch())
    try:
        yield lambda: worst
    finally:
        task.cancel()
