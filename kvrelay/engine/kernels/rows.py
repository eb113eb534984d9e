"""What happens to each row between two matmuls: norm, quantise, rope, activation. And its loops.

Row buffers are float32, padded with zeros to a multiple of 64, so that no loop has a tail.
"""

from numba import njit

from kvrelay.engine.kernels.functions import exp
from kvrelay.engine.kernels.vector import LANES, Code, Int, Vec, emitted
from kvrelay.engine.shapes import GROUP, GROUP_SCALE_BYTES, LINE_BYTES

_INT8_MAX = 127
_SCALE_MIN = 1e-30  # of a group of zeros


@emitted
def _normalize(
    c: Code, x: Int, weight: Int, out: Int, count: Int, padded: Int, epsilon: Int
) -> None:
    """out = x / rms(x) * weight. count: address of the row's length as float32; epsilon alike."""
    total = c.variable(c.floats(0.0))
    with c.each(padded, LANES) as i:
        value = c.load(x + i * 4)
        total.set(c.fma(value, value, total.get()))
    mean = c.sum_lanes(total.get()) / c.spread(count)
    factor = c.floats(1.0) / c.square_root(mean + c.spread(epsilon))
    with c.each(padded, LANES) as i:
        c.store(out + i * 4, c.load(x + i * 4) * factor * c.load(weight + i * 4))


@emitted
def _quantize(c: Code, x: Int, groups: Int, out: Int, scales: Int) -> None:
    """Signed bytes, and for each group its scale and -128 times the sum of its bytes.

    That corrects for weights stored with 128 added.
    """
    with c.each(groups) as g:
        source, target = x + g * (GROUP * 4), out + g * GROUP
        parts = [c.load(source + n * LINE_BYTES) for n in range(GROUP // LANES)]
        scale = c.maximum(c.largest(parts), c.floats(_SCALE_MIN)) * (1 / _INT8_MAX)
        inverse = c.first_lane(c.floats(1.0) / scale)
        total = c.ints(0)
        for n, part in enumerate(parts):
            whole = c.rounded(part * inverse)
            c.store_int8(target + n * LANES, whole)
            total = total + whole
        own = scales + g * GROUP_SCALE_BYTES
        c.store_first(own, scale)
        correction = c.builder.shl(c.sum_int_lanes(total).value, c.ints(7).value)
        negative = c.builder.sub(c.ints(0).value, correction)
        c.store_first_int(own + 4, type(total)(c, negative))


@emitted
def _gate_silu(c: Code, gate: Int, up: Int, out: Int, count: Int) -> None:
    with c.each(count, LANES) as i:
        g = c.load(gate + i * 4)
        activated = g / (exp(c, c.floats(0.0) - g) + 1.0)
        c.store(out + i * 4, activated * c.load(up + i * 4))


@emitted
def _add_row(c: Code, x: Int, other: Int, count: Int) -> None:
    with c.each(count, LANES) as i:
        c.store(x + i * 4, c.load(x + i * 4) + c.load(other + i * 4))


@emitted
def _clear(c: Code, out: Int, count: Int) -> None:
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.floats(0.0))


@emitted
def _copy_row(c: Code, x: Int, out: Int, count: Int) -> None:
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.load(x + i * 4))


@emitted
def _rotate_vectors(c: Code, x: Int, half_bytes: Int, cosine: Int, sine: Int) -> None:
    """16 pairs (x[i], x[i + half]) turned by their angles."""
    left, right = c.load(x), c.load(x + half_bytes)
    cos, sin = c.load(cosine), c.load(sine)
    c.store(x, left * cos - right * sin)
    c.store(x + half_bytes, right * cos + left * sin)


@emitted
def _rotate_short(c: Code, x: Int, cosine: Int, sine: Int) -> None:
    """A head of 16: its 8 pairs are in one vector. The angles' rows are read 8 floats too far."""
    half = LANES // 2
    both, twice = c.load(x).value, [lane % half for lane in range(LANES)]
    cos, sin = c.load(cosine).value, c.load(sine)
    turned = [(lane + half) % LANES for lane in range(LANES)]
    negative = (c.floats(0.0) - sin).value
    signed = c.shuffle(negative, sin.value, [*range(half), *range(LANES, LANES + half)])
    straight = Vec(c, both) * Vec(c, c.shuffle(cos, cos, twice))
    c.store(x, straight + Vec(c, c.shuffle(both, both, turned)) * Vec(c, signed))


@njit(nogil=True, cache=True)
def normalize(x, weight, out, count, padded, epsilon):  # type: ignore[no-untyped-def]
    _normalize(x, weight, out, count, padded, epsilon)


@njit(nogil=True, cache=True)
def quantize(x, groups, out, scales):  # type: ignore[no-untyped-def]
    """x: `[64 * groups]` float32; out: as many int8; scales: 8 bytes a group."""
    _quantize(x, groups, out, scales)


@njit(nogil=True, cache=True)
def gate_silu(gate, up, out, count):  # type: ignore[no-untyped-def]
    """out = silu(gate) * up."""
    _gate_silu(gate, up, out, count)


@njit(nogil=True, cache=True)
def add_row(x, other, count):  # type: ignore[no-untyped-def]
    _add_row(x, other, count)


@njit(nogil=True, cache=True)
def clear(out, count):  # type: ignore[no-untyped-def]
    _clear(out, count)


@njit(nogil=True, cache=True)
def copy_row(x, out, count):  # type: ignore[no-untyped-def]
    _copy_row(x, out, count)


@njit(nogil=True, cache=True)
def rotate(x, half, cosine, sine):  # type: ignore[no-untyped-def]
    """Rope on one head of 2 * half dimensions; half is 8 or a multiple of 16."""
    if half == LANES // 2:
        _rotate_short(x, cosine, sine)
    for i in range(0, half - LANES + 1, LANES):
        _rotate_vectors(x + i * 4, half * 4, cosine + i * 4, sine + i * 4)


@njit(nogil=True, cache=True)
def quantize_rows(x, count, groups, out, scales):  # type: ignore[no-untyped-def]
    """As quantize, of count rows one after the other."""
    for row in range(count):
        source, target = x + row * groups * GROUP * 4, out + row * groups * GROUP
        _quantize(source, groups, target, scales + row * groups * GROUP_SCALE_BYTES)
