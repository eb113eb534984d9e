"""How long the event loop keeps everybody waiting while something is under way."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

_TURN_S = 0.001


@dataclass
class Gap:
    longest_s: float = 0.0


@contextlib.asynccontextmanager
async def loop_gap() -> AsyncIterator[Gap]:
    """What it gives is to be read after the context has ended."""
    gap = Gap()

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_TURN_S)
            gap.longest_s = max(gap.longest_s, time.perf_counter() - began - _TURN_S)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield gap
        await asyncio.sleep(2 * _TURN_S)  # so that a gap at the very end is seen
    finally:
        watching.cancel()
