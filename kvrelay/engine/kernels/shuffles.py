"""Bytes and lanes put in another order: columns for rows, quads of bytes, sums and differences."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kvrelay.engine.kernels.functions import TO_INTEGER
from kvrelay.engine.kernels.vector import BYTES, F32, LANES, Code, Int, Vec, emitted
from kvrelay.engine.shapes import LINE_BYTES


def transposed(c: Code, rows: Sequence[Vec]) -> list[Vec]:
    """16 rows of 16, as columns."""
    turned = [row.value for row in rows]
    distance = 1
    while distance < LANES:
        for n in range(LANES):
            if n & distance == 0:
                a, b = turned[n], turned[n + distance]
                first = [i + LANES - distance if i & distance else i for i in range(LANES)]
                second = [i + LANES if i & distance else i + distance for i in range(LANES)]
                turned[n] = c.shuffle(a, b, first)
                turned[n + distance] = c.shuffle(a, b, second)
        distance *= 2
    return [Vec(c, row) for row in turned]


@emitted
def turn_keys(
    c: Code,
    source: Int,
    stride: Int,
    target: Int,
    target_stride: Int,
    ahead: Int,
    ahead_stride: Int,
    side: Int,
) -> None:
    """64 bytes each of 16 keys, as 16 columns of a panel whose rows are target_stride apart.

    Beside each load it asks for a line of the keys at `ahead` and one of their values, `side` bytes
    on: memory answers while this tile is computed, and nowhere does a burst of requests wait.
    """
    rows = []
    for n in range(LANES):
        rows.append(c.load(source + stride * n))
        c.prefetch(ahead + ahead_stride * n)
        c.prefetch(ahead + ahead_stride * n + side)
    for n, column in enumerate(transposed(c, rows)):
        c.store(target + target_stride * n, column)


def quads_of(c: Code, rows: Sequence[Any]) -> list[Any]:
    """Four rows of 64 bytes as four of 16 quads: a byte of each row side by side."""
    words = ir.VectorType(ir.IntType(16), LINE_BYTES // 2)
    halves = []
    for a, b in (rows[:2], rows[2:]):
        for half in range(2):
            first = range(half * 32, half * 32 + 32)
            lanes = [lane for i in first for lane in (i, i + LINE_BYTES)]
            halves.append(c.builder.bitcast(c.shuffle(a, b, lanes), words))
    quads = []
    for half in range(2):
        for part in range(2):
            first = range(part * 16, part * 16 + 16)
            lanes = [lane for i in first for lane in (i, i + 32)]
            mixed = c.shuffle(halves[half], halves[half + 2], lanes)
            quads.append(c.builder.bitcast(mixed, BYTES))
    return quads


def spread_out(c: Code, parts: Sequence[Vec]) -> list[Vec]:
    """The Walsh-Hadamard transform of 2^n vectors, not scaled: each output has a part, of the
    same size, of each input."""
    parts = list(parts)
    for stage in range(4):
        distance = 1 << stage
        signs = [-1.0 if lane & distance else 1.0 for lane in range(LANES)]
        sign = Vec(c, ir.Constant(F32, [ir.Constant(F32.element, one) for one in signs]))
        lanes = [lane ^ distance for lane in range(LANES)]
        parts = [
            c.fma(part, sign, Vec(c, c.shuffle(part.value, part.value, lanes))) for part in parts
        ]
    distance = 1
    while distance < len(parts):
        parts = [
            parts[n] + parts[n ^ distance] if n & distance == 0 else parts[n ^ distance] - part
            for n, part in enumerate(parts)
        ]
        distance *= 2
    return parts


def store_unsigned(c: Code, address: Int, values: Sequence[Vec]) -> None:
    """Rounds 64 numbers of 0..255 to bytes, ties to even."""
    quads = [c.builder.bitcast((value + TO_INTEGER).value, BYTES) for value in values]
    lowest = list(range(0, 2 * LINE_BYTES, 4))
    halves = [c.shuffle(quads[n], quads[n + 1], lowest) for n in (0, 2)]
    c.store_bytes(address, c.shuffle(halves[0], halves[1], range(LINE_BYTES)))
