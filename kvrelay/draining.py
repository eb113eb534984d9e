"""How a worker drains: it takes nothing new, and waits until what it has is done.

Called by both worker services; what a worker has, and that nothing new comes in, is its own matter.
"""

import asyncio
from collections.abc import Callable


class DrainingError(Exception):
    """This worker takes nothing new."""


async def drained(is_idle: Callable[[], bool], changed: asyncio.Event, deadline_s: float) -> bool:
    """Returns when the worker is idle; False when that took longer than deadline_s.

    changed: set whenever it may have become idle.
    """
    try:
        async with asyncio.timeout(deadline_s):
            while not is_idle():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return False
    return True
