"""The running softmax of int8 attention: scores in, weights as bytes out. For int8_segment.py.

Of a row in a tile it leaves two numbers: its largest weight, as an exponent of 2, and the sum of
its weights. They and what becomes of them are kept for all rows side by side, in levels
`[6, rows]` float32, so that `advance` handles 16 rows at once.
"""

import math

from kvrelay.engine.kernels.functions import exp2, exp2_coarse, tanh
from kvrelay.engine.kernels.shuffles import store_unsigned
from kvrelay.engine.kernels.softmax import KEY_TILE, NOTHING_YET, TILE_BYTES
from kvrelay.engine.kernels.vector import LANES, Code, Int, emitted
from kvrelay.engine.shapes import LINE_BYTES

# Rows of levels.
TOPS = 0  # largest of this tile
ADDED = 1  # sum of weights of this tile
LARGEST = 2  # largest so far
SUMS = 3  # sum of weights so far
SHRINKS = 4  # what the tiles before are to be multiplied with
FACTORS = 5  # and what this one
LEVELS = 6
_WEIGHT_MAX = 255


def _score(
    c: Code,
    dots: Int,
    q_scale: Int,
    scales: Int,
    top_at: Int,
    seen: tuple[Int, Int] | None = None,
    softcap: Int | None = None,
) -> None:
    """Dot products `[64]` int32 become scores, -inf outside of `seen`, and top is found."""
    own = c.spread(q_scale)
    scores = []
    for n in range(KEY_TILE // LANES):
        at = n * LINE_BYTES
        score = c.to_float(c.load_ints(dots + at)) * c.load_line(scales + at)
        of_value = c.load_line(scales + TILE_BYTES + at)
        if softcap is None:
            score = c.fma(score, own, of_value)
        else:
            limit = c.spread(softcap)
            score = c.fma(tanh(c, score * own / limit), limit, of_value)
        if seen is not None:
            lanes = c.lane_numbers() + c.ints(n * LANES)
            low, high = (c.ints(end) for end in seen)
            score = c.select_between(low, lanes, high, score, c.floats(float("-inf")))
        c.store(dots + at, score)
        scores.append(score)
    a, b = c.larger(scores[0], scores[1]), c.larger(scores[2], scores[3])
    # NOTHING_YET is what all of them are less than when the row sees none.
    largest = c.larger(c.larger_lanes(c.larger(a, b)), c.floats(NOTHING_YET))
    c.store_first(top_at, largest)


@emitted
def score_all(c: Code, dots: Int, q_scale: Int, scales: Int, top: Int) -> None:
    """A row that sees all keys of a tile: the same bits as score_some, in less time.

    scales: see int8_segment._read_scales.
    """
    _score(c, dots, q_scale, scales, top)


@emitted
def score_some(
    c: Code, dots: Int, q_scale: Int, scales: Int, first: Int, last: Int, top: Int
) -> None:
    """A row that sees keys first to last of a tile."""
    _score(c, dots, q_scale, scales, top, (first, last))


@emitted
def score_capped(
    c: Code, dots: Int, q_scale: Int, scales: Int, first: Int, last: Int, softcap: Int, top: Int
) -> None:
    """As score_some. softcap: an address of a float32."""
    _score(c, dots, q_scale, scales, top, (first, last), softcap)


@emitted
def weigh(c: Code, scores: Int, scales: Int, top_at: Int, weights: Int, sum_at: Int) -> None:
    """A row's weights as bytes, and the sum of what they are without the values' scales.

    In a loop of its own: a row's scores have to wait for the last of them, other rows fill the gap.
    """
    top = c.spread(top_at)
    found = []
    for n in range(KEY_TILE // LANES):
        below = c.load_line(scores + n * LINE_BYTES) - top  # exact near the top, where it matters
        found.append(exp2_coarse(c, below + math.log2(_WEIGHT_MAX)))
    store_unsigned(c, weights, found)
    total = c.floats(0.0)
    for n, weight in enumerate(found):
        inverse = c.load_line(scales + 2 * TILE_BYTES + n * LINE_BYTES)
        total = c.fma(weight, inverse, total)
    c.store_first(sum_at, c.sum_lanes(total))


@emitted
def start_levels(c: Code, levels: Int, stride: Int) -> None:
    """stride: bytes of one row of levels."""
    with c.each(stride, LINE_BYTES) as i:
        c.store(levels + stride * LARGEST + i, c.floats(NOTHING_YET))
        c.store(levels + stride * SUMS + i, c.floats(0.0))


@emitted
def advance(c: Code, levels: Int, stride: Int) -> None:
    """From one tile to the next, for all rows."""
    with c.each(stride, LINE_BYTES) as i:
        at = levels + i
        top, before = c.load(at + stride * TOPS), c.load(at + stride * LARGEST)
        largest = c.larger(top, before)
        shrink, factor = exp2(c, before - largest), exp2(c, top - largest)
        kept = c.load(at + stride * SUMS) * shrink
        c.store(at + stride * SUMS, c.fma(c.load(at + stride * ADDED), factor, kept))
        c.store(at + stride * LARGEST, largest)
        c.store(at + stride * SHRINKS, shrink)
        c.store(at + stride * FACTORS, factor)
