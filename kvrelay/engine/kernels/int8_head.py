"""A head's query, key or value in int8: 64-byte lines and one scale. For an int8 KV cache.

Queries and keys are spread out first: each 64 of them go through a Walsh-Hadamard transform, which
leaves their dot product as it was (64 times as large) and shares out the few large dimensions that
keys are known to have. Without it these set the scale and the others are lost in it: bytes for keys
then cost four times as much (SmolLM2, in the divergence of its predictions). Values have no such
dimensions and stay as they are.
"""

from numba import njit

from kvrelay.engine.kernels.shuffles import spread_out
from kvrelay.engine.kernels.vector import LANES, Code, Int, Ints, Vec, emitted
from kvrelay.engine.shapes import GROUP, LINE_BYTES

INT8_MAX = 127
SPREAD = 1 / 64  # of a dot product of two vectors that are both spread out
SCALE_MIN = 1e-20  # of a head of zeros; its inverse times a weight is far from overflow
SCALE_MAX = 3e36
OFFSET = 128  # added to keys, which are the unsigned side of a dot product


def _group(c: Code, x: Int, count: Int, first: Int, spread: bool) -> list[Vec]:
    """The 64 numbers of x from `first` on; those from count on are 0."""
    parts = [c.variable(c.floats(0.0)) for _ in range(GROUP // LANES)]
    for n, part in enumerate(parts):
        with c.when(c.is_less(first + n * LANES, count)):
            part.set(c.load(x + first * 4 + n * LINE_BYTES))
    loaded = [part.get() for part in parts]
    return spread_out(c, loaded) if spread else loaded


def _quantize(
    c: Code, x: Int, count: Int, out: Int, *, spread: bool, offset: int = 0, finite: bool = True
) -> tuple[Vec, Ints]:
    """Symmetric, ties to even. Gives the scale and the sum of the bytes without their offset.

    finite: one that holds a number that is not finite becomes all zeros: it would spoil whoever
    gives it weight 0.
    """
    largest = c.variable(c.floats(0.0))
    with c.each(count, GROUP) as first:
        largest.set(c.largest([largest.get(), *_group(c, x, count, first, spread)]))
    scale = c.maximum(largest.get() * (1 / INT8_MAX), c.floats(SCALE_MIN))
    if finite:
        scale = c.select_less(scale, SCALE_MAX, scale, c.floats(SCALE_MIN))
    inverse = c.first_lane(c.floats(1.0) / scale)
    total = c.variable(c.ints(0))
    with c.each(count, GROUP) as first:
        for n, part in enumerate(_group(c, x, count, first, spread)):
            whole = c.rounded(part * inverse)
            total.set(total.get() + whole)
            c.store_int8(out + first + n * LANES, whole + c.ints(offset))
    return scale, c.sum_int_lanes(total.get())


@emitted
def _query(c: Code, x: Int, count: Int, factor: Int, out: Int, scale: Int) -> None:
    own, total = _quantize(c, x, count, out, spread=True, finite=False)
    c.store_first(scale, own * c.spread(factor) * SPREAD)
    shifted = c.builder.mul(total.value, c.ints(-OFFSET).value)
    c.store_first_int(scale + 4, Ints(c, shifted))


@emitted
def _key(c: Code, x: Int, count: Int, out: Int, scale: Int) -> None:
    c.store_first(scale, _quantize(c, x, count, out, spread=True, offset=OFFSET)[0])


@emitted
def _value(c: Code, x: Int, count: Int, out: Int, scale: Int) -> None:
    c.store_first(scale, _quantize(c, x, count, out, spread=False)[0])


@njit(nogil=True, cache=True)
def write_query(x, count, factor, out, scale):  # type: ignore[no-untyped-def]
    """x `[count]` float32. scale: that of its dot product with a key's bytes, times the float32 at
    factor; then, int32, what that product must begin with to make up for the keys' offset."""
    _query(x, count, factor, out, scale)


@njit(nogil=True, cache=True)
def write_key(x, count, out, scale):  # type: ignore[no-untyped-def]
    _key(x, count, out, scale)


@njit(nogil=True, cache=True)
def write_value(x, count, out, scale):  # type: ignore[no-untyped-def]
    _value(x, count, out, scale)
