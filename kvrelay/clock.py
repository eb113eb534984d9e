"""The one clock that roles decide by: the running event loop's.

On asyncio's own loop it is time.monotonic(). The simulation (cluster/simulation/) runs the same
code on loops whose time is virtual, so nothing that decides may read another clock.
"""

from asyncio import get_running_loop


def now_s() -> float:
    return get_running_loop().time()


def now_ms() -> float:
    return get_running_loop().time() * 1000
