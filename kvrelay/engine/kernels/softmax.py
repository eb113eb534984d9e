"""The running softmax of float attention, row by row, and how the results of segments are joined.

A row's state is the maximum of its scores so far and the sum of its weights, two float32; its total
is its weighted sum of values so far.
"""

from numba import njit

from kvrelay.engine.kernels.functions import exp2, tanh
from kvrelay.engine.kernels.vector import LANES, Code, Int, Vec, emitted
from kvrelay.engine.shapes import LINE_BYTES

KEY_TILE = 64
SEGMENT = 256
TILE_BYTES = KEY_TILE * 4  # of a row of scores
NOTHING_YET = -1e30  # a maximum; not -inf, whose difference with itself is no number


@emitted
def _cap(c: Code, scores: Int, softcap: Int) -> None:
    """A row of scores; softcap: an address of a float32. Both in the units of RULE."""
    limit = c.spread(softcap)
    with c.each(c.number(KEY_TILE), LANES) as i:
        c.store(scores + i * 4, tanh(c, c.load(scores + i * 4) / limit) * limit)


def _softmax(c: Code, rows: list[tuple[Int, Int, Int, Int, Int]], padded: Int) -> None:
    """For each row (scores, first, last, state, total), side by side so that they overlap:

    turns scores of keys first..last of a tile into weights, those of other keys into 0. state: the
    row's maximum so far and the sum of its weights. total `[padded]`: its values so far. Both are
    brought to the new maximum.
    """
    nothing = c.floats(float("-inf"))
    parts: list[list[Vec]] = []
    for scores, first, last, _, _ in rows:
        low, high = c.ints(first), c.ints(last)
        own = []
        for n in range(KEY_TILE // LANES):
            lanes = c.lane_numbers() + c.ints(n * LANES)
            score = c.load(scores + n * LINE_BYTES)
            own.append(c.select_between(low, lanes, high, score, nothing))
        parts.append(own)
    before = [c.spread(state) for _, _, _, state, _ in rows]
    largest = []
    for own, old in zip(parts, before, strict=True):
        a, b = c.maximum(own[0], own[1]), c.maximum(own[2], own[3])
        largest.append(c.maximum(c.maximum_lanes(c.maximum(a, b)), old))
    sums = []
    for row, own, top in zip(rows, parts, largest, strict=True):
        weights = [exp2(c, part - top) for part in own]
        for n, weight in enumerate(weights):
            c.store(row[0] + n * LINE_BYTES, weight)
        sums.append(c.sum_lanes((weights[0] + weights[1]) + (weights[2] + weights[3])))
    for row, old, top, added in zip(rows, before, largest, sums, strict=True):
        _, _, _, state, total = row
        kept = c.variable(c.spread(state + 4))
        with c.when(c.differs(old, top)):
            shrink = exp2(c, old - top)
            kept.set(kept.get() * shrink)
            c.store_first(state, top)
            with c.each(padded, LANES) as i:
                c.store(total + i * 4, c.load(total + i * 4) * shrink)
        c.store_first(state + 4, kept.get() + added)


@emitted
def _softmax_one(
    c: Code, scores: Int, first: Int, last: Int, state: Int, total: Int, padded: Int
) -> None:
    _softmax(c, [(scores, first, last, state, total)], padded)


@emitted
def _softmax_two(
    c: Code,
    scores: Int,
    first: Int,
    last: Int,
    next_first: Int,
    next_last: Int,
    state: Int,
    total: Int,
    padded: Int,
) -> None:
    """A row and the next one."""
    here = (scores, first, last, state, total)
    there = (scores + TILE_BYTES, next_first, next_last, state + 8, total + padded * 4)
    _softmax(c, [here, there], padded)


@emitted
def merge_row(c: Code, into: Int, into_state: Int, segment: Int, state: Int, padded: Int) -> None:
    """Adds one segment's result to a row's."""
    ours, theirs = c.spread(into_state), c.spread(state)
    largest = c.maximum(ours, theirs)
    left, right = exp2(c, ours - largest), exp2(c, theirs - largest)
    weight = c.spread(into_state + 4) * left + c.spread(state + 4) * right
    with c.each(padded, LANES) as i:
        merged = c.load(into + i * 4) * left + c.load(segment + i * 4) * right
        c.store(into + i * 4, merged)
    c.store_first(into_state, largest)
    c.store_first(into_state + 4, weight)


@emitted
def finish_row(c: Code, total: Int, state: Int, out: Int, count: Int) -> None:
    weight = c.spread(state + 4)
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.load(total + i * 4) / weight)


@emitted
def start_row(c: Code, state: Int, total: Int, padded: Int) -> None:
    c.store_first(state, c.floats(NOTHING_YET))
    c.store_first(state + 4, c.floats(0.0))
    with c.each(padded, LANES) as i:
        c.store(total + i * 4, c.floats(0.0))


@njit(nogil=True, cache=True)
def softmax_rows(pool, rule, start, tile, rows, work, states, totals):  # type: ignore[no-untyped-def]
    """work.scores `[rows, 64]` of the keys from `tile` on become weights."""
    wide = pool.head_pad * 4
    row = 0
    while row < rows:
        scores = work.scores + row * TILE_BYTES
        state, total = states + row * 8, totals + row * wide
        last = start + row // rule.group - tile
        first = max(0, last - rule.window + 1) if rule.window else 0
        if rule.softcap:
            _cap(scores, rule.softcap)
        if row + 1 == rows:
            _softmax_one(scores, first, last, state, total, pool.head_pad)
            return
        next_last = start + (row + 1) // rule.group - tile
        next_first = max(0, next_last - rule.window + 1) if rule.window else 0
        if rule.softcap:
            _cap(scores + TILE_BYTES, rule.softcap)
        _softmax_two(
            scores, first, last, next_first, next_last, state, total, pool.head_pad
        )  # fmt: skip
        row += 2
