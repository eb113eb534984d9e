"""Where keys are cut into tiles and segments: at the same positions whoever asks.

What is added up in one go is decided here, and so a token's bits. For paged.py, and for
float_segment.py and int8_segment.py, which go through the tiles of a segment.
"""

from numba import njit

from kvrelay.engine.kernels.softmax import KEY_TILE, SEGMENT


@njit(nogil=True, cache=True)
def first_segment(rule, position):  # type: ignore[no-untyped-def]
    """The first that a query at `position` sees anything of."""
    if rule.window and position >= rule.window:
        return (position - rule.window + 1) // SEGMENT * SEGMENT
    return 0


@njit(nogil=True, cache=True)
def tiles_of(rule, segment, start, tokens):  # type: ignore[no-untyped-def]
    """(begin, end): the segment's keys that queries from `start` on see, from the first tile on
    that they see anything of."""
    begin = segment
    if rule.window:
        begin = max(begin, (start - rule.window + 1) // KEY_TILE * KEY_TILE)
    return begin, min(start + tokens, segment + SEGMENT)


@njit(nogil=True, cache=True)
def tile_after(pool, tile, begin, end, head):  # type: ignore[no-untyped-def]
    """(position, head) of what is read after a tile: the next one, or the next head's first."""
    if tile + KEY_TILE < end:
        return tile + KEY_TILE, head
    return begin, min(head + 1, pool.kv_heads - 1)
