"""A copy that passes the caches by: what is written is for another core, or for much later.

Used by the shm link. An ordinary copy reads each line of the target before it writes it, which for
blocks of KV is a third of its time.
"""

import numpy as np
from numba import njit

from kvrelay.engine.kernels.vector import Code, Int, emitted
from kvrelay.engine.shapes import LINE_BYTES

_LINES = 4  # in flight together


@emitted
def _stream(c: Code, source: Int, target: Int, count: Int) -> None:
    """count: a multiple of 4 lines; target: a multiple of 64."""
    with c.each(count, _LINES * LINE_BYTES) as at:
        lines = [c.load(source + at + n * LINE_BYTES) for n in range(_LINES)]
        for n, line in enumerate(lines):
            c.store_past_caches(target + at + n * LINE_BYTES, line)
    c.finish_stores()


@njit("void(int64, int64, int64)", nogil=True, cache=True)  # compiled on import, not in a hand-off
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    _stream(source, target, count)


def stream_copy(source: np.ndarray, target: np.ndarray) -> None:
    """target = source, both `[bytes]` uint8; seen by other processes when it returns."""
    piece = _LINES * LINE_BYTES
    count = len(source)
    if len(target) != count:
        raise ValueError(f"{count} bytes do not fit {len(target)}")
    ahead = -target.ctypes.data % LINE_BYTES  # up to the first whole line
    whole = max(0, count - ahead) // piece * piece
    if whole:
        _copy(source.ctypes.data + ahead, target.ctypes.data + ahead, whole)
    np.copyto(target[:ahead], source[:ahead])
    np.copyto(target[ahead + whole :], source[ahead + whole :])
