"""Waiting for a condition that has no event of its own."""

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], bool], *, within_s: float) -> float:
    """Seconds until `condition` held; AssertionError when it did not in time."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.002)
    return time.monotonic() - started
