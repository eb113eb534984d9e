"""The compiled kernels one by one: matrix tiles, rows, rounding.

Where a result has one right value it is compared to the bit, with numpy as the model.
"""

import float_models
import numpy as np
import pytest
import torch
from numba import njit

from kvrelay.engine.kernels import rows, tiles
from kvrelay.engine.kernels.functions import exp, exp2, tanh
from kvrelay.engine.kernels.threads import Team, aligned
from kvrelay.engine.kernels.vector import LANES, Code, Int, emitted
from kvrelay.engine.packed import linear_record, pack
from kvrelay.engine.shapes import (
    GROUP,
    GROUP_SCALE_BYTES,
    LINE_BYTES,
    PANEL,
    PackedShape,
    up_to,
)

ROWS_MAX = 20  # past one tile of float rows (14) and two of int8 rows (7)
INPUTS = (1, 7, 64, 100)
OUTPUTS = (1, 2, 16, 31, 32, 33, 63, 64, 65, 70)
GUARD = np.float32(12345.0)


def random_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, width), np.float32)


def lined_up(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.size, array.dtype)
    copy[:] = array.reshape(-1)
    return copy.reshape(array.shape)


def buffer(array: np.ndarray) -> np.void:
    return np.array((array.ctypes.data, array.strides[0]), tiles.BUFFER)[()]


class Layer:
    """A random linear layer, packed."""

    def __init__(self, outputs: int, inputs: int, int8: bool, seed: int = 1) -> None:
        self.shape = PackedShape(outputs, inputs, int8)
        self.weight = random_rows(outputs, inputs, seed)
        self.packed = lined_up(pack(self.weight, self.shape))
        self._record = linear_record(self.shape, self.packed.ctypes.data)[()]

    def padded(self, x: np.ndarray) -> np.ndarray:
        """x as the kernels take it: int8 wants whole groups."""
        wide = up_to(self.shape.inputs, GROUP) if self.shape.int8 else self.shape.inputs
        result = np.zeros((len(x), wide), np.float32)
        result[:, : x.shape[1]] = x
        return result

    def run(self, x: np.ndarray, start: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
        """`[rows, outputs]` = x `[rows, inputs]` x the layer, plus start."""
        count, wide = len(x), self.shape.panels * PANEL
        source = self.padded(x)
        whole = np.zeros((count, source.shape[1]), np.int8)
        scales = np.zeros((count, max(1, self.shape.groups) * GROUP_SCALE_BYTES), np.uint8)
        for row in range(count if self.shape.int8 else 0):
            at = (array[row].ctypes.data for array in (source, whole, scales))
            source_at, whole_at, scales_at = at
            rows.quantize(source_at, self.shape.groups, whole_at, scales_at)
        out = np.full((count + 1, wide + LANES), GUARD, np.float32)
        if start is not None:
            out[:count, : self.shape.outputs] = start
        counter = aligned(LINE_BYTES, np.uint8)
        buffers = [buffer(array) for array in (source, whole, scales, out)]
        add = int(start is not None)
        team = Team(threads)
        arguments = (team.seats, counter.ctypes.data, self._record, count, *buffers, add)
        team.run(lambda thread, number: tiles.run_linear(thread, number, *arguments))
        team.close()
        assert (out[count:] == GUARD).all(), "a row too many was written"
        assert (out[:, wide:] == GUARD).all(), "wrote beyond the panels"
        return out[:count, : self.shape.outputs].copy()


# ---- matrix tiles


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(inputs, int8):
    x = random_rows(ROWS_MAX, inputs)
    for outputs in OUTPUTS:
        layer = Layer(outputs, inputs, int8)
        alone = np.concatenate([layer.run(x[row : row + 1]) for row in range(ROWS_MAX)])
        for count in range(1, ROWS_MAX + 1):
            assert layer.run(x[:count]).tobytes() == alone[:count].tobytes(), (outputs, count)


@pytest.mark.parametrize("inputs", INPUTS)
def test_float_sums_go_in_the_order_of_the_inputs(inputs):
    for outputs in range(1, 71, 3):
        layer = Layer(outputs, inputs, int8=False)
        x = random_rows(15, inputs) * np.float32(10.0) ** random_rows(15, inputs, seed=2)
        expected = float_models.product(x, layer.weight)
        assert layer.run(x).tobytes() == expected.tobytes(), outputs
        start = random_rows(15, outputs, seed=3)
        expected = float_models.product(x, layer.weight, start)
        assert layer.run(x, start).tobytes() == expected.tobytes(), outputs


def test_a_sum_in_two_parts_is_the_sum_at_once():
    layer, x = Layer(33, 100, int8=False), random_rows(5, 100)
    first, last = (Layer(33, 50, int8=False) for _ in range(2))
    for part, weight in ((first, layer.weight[:, :50]), (last, layer.weight[:, 50:])):
        part.packed[:] = pack(weight, part.shape)
    in_parts = last.run(np.ascontiguousarray(x[:, 50:]), first.run(x[:, :50].copy()))
    assert in_parts.tobytes() == layer.run(x).tobytes()


@pytest.mark.parametrize("inputs", INPUTS)
def test_int8_sums_are_whole_within_a_group_and_groups_are_added_in_order(inputs):
    for outputs in range(1, 71, 3):
        layer = Layer(outputs, inputs, int8=True)
        x = random_rows(15, inputs) * np.float32(10.0) ** random_rows(15, 1, seed=2)
        expected = float_models.product_int8(layer.padded(x), layer.packed, layer.shape)
        assert layer.run(x).tobytes() == expected.tobytes(), outputs


def test_int8_sums_do_not_overflow_at_the_extremes():
    layer = Layer(32, GROUP, int8=True)
    for sign in (1, -1):
        layer.packed[:] = pack(np.full((32, GROUP), 3.0 * sign, np.float32), layer.shape)
        for value in (5.0, -5.0):
            x = np.full((15, GROUP), value, np.float32)
            expected = np.full((15, 32), 3.0 * sign * value * GROUP, np.float32)
            np.testing.assert_allclose(layer.run(x), expected, rtol=1e-6)


def test_int8_is_near_the_exact_product():
    layer, x = Layer(70, 300, int8=True), random_rows(9, 300)
    exact = x.astype(np.float64) @ layer.weight.T.astype(np.float64)
    assert np.abs(layer.run(x) - exact).std() < 0.02 * exact.std()


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_no_row_is_touched_by_what_is_wrong_in_another(int8):
    layer, x = Layer(40, 100, int8), random_rows(16, 100)
    clean = layer.run(x)
    for bad in (np.nan, np.inf, 1e38):
        dirty = x.copy()
        dirty[3, 17] = bad
        result = layer.run(dirty)
        others = [row for row in range(16) if row != 3]
        assert result[others].tobytes() == clean[others].tobytes()
        if bad != 1e38:
            assert not np.isfinite(result[3]).any()


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_threads_share_a_layer_and_change_no_bit(int8):
    layer, x = Layer(70 * PANEL, 100, int8), random_rows(200, 100)  # 70 panels, 3 row blocks
    assert layer.run(x, threads=3).tobytes() == layer.run(x).tobytes()


@pytest.mark.parametrize("vnni", [False, True])
def test_bytes_are_multiplied_alike_with_and_without_vnni(vnni):
    if vnni and not tiles.HAS_VNNI:
        pytest.skip("this processor has no VNNI")

    @emitted
    def emit(c: Code, unsigned: Int, signed: Int, out: Int) -> None:
        kept = [c.load_bytes(unsigned), c.spread_ints(signed)]
        total = c.dot_bytes(c.ints(-7), *kept, vnni)
        c.store(
            out, type(c.floats(0.0))(c, c.builder.bitcast(total.value, c.floats(0.0).value.type))
        )

    @njit
    def dot(unsigned, signed, out):
        emit(unsigned, signed, out)

    for quad in ((-128, -128, -128, -128), (127, 127, 127, 127), (1, -2, 3, -128)):
        unsigned, signed = aligned(64, np.uint8), np.array(quad, np.int8)
        unsigned[:] = np.random.default_rng(0).choice([0, 1, 128, 254, 255], 64)
        out = aligned(LANES, np.int32)
        dot(unsigned.ctypes.data, signed.ctypes.data, out.ctypes.data)
        expected = unsigned.reshape(LANES, 4).astype(np.int32) @ signed.astype(np.int32) - 7
        assert (out == expected).all()


# ---- rows


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row by the kernel, in the form of float_models.quantized."""
    groups = x.size // GROUP
    whole, scales = aligned(x.size, np.int8), aligned(groups * GROUP_SCALE_BYTES, np.uint8)
    source = lined_up(x)
    rows.quantize(source.ctypes.data, groups, whole.ctypes.data, scales.ctypes.data)
    pairs = scales.reshape(groups, GROUP_SCALE_BYTES)
    own = np.ascontiguousarray(pairs[:, :4]).view(np.float32).reshape(1, groups)
    corrections = np.ascontiguousarray(pairs[:, 4:]).view(np.int32).reshape(1, groups)
    return whole.reshape(1, groups, GROUP), own, corrections


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-7, 1.0, 1e5, 3e38])
def test_quantize_is_its_model_to_the_bit(size):
    for seed in range(5):
        x = np.clip(random_rows(1, 5 * GROUP, seed), -1.0, 1.0) * np.float32(size)
        x[0, :GROUP] = 0.0
        expected = float_models.quantized(x)
        for ours, theirs in zip(quantize(x), expected, strict=True):
            assert (ours == theirs).all()


def test_quantize_reaches_127_and_rounds_ties_to_even():
    x = np.zeros((1, GROUP), np.float32)
    x[0, :6] = (127.0, -127.0, 0.5, 1.5, 2.5, -0.5)
    whole, scales, corrections = quantize(x)
    assert whole[0, 0, :6].tolist() == [127, -127, 0, 2, 2, 0]
    assert scales[0, 0] == np.float32(127.0) * np.float32(1 / 127)
    assert corrections[0, 0] == -128 * 4


@pytest.mark.parametrize("count", [16, 48, 64, 160])
def test_normalize(count):
    padded = up_to(count, GROUP)
    x, weight, out = (aligned(padded, np.float32) for _ in range(3))
    x[:count], weight[:count] = random_rows(2, count)
    constants = np.array([count, 1e-5], np.float32)
    at = constants.ctypes.data
    rows.normalize(x.ctypes.data, weight.ctypes.data, out.ctypes.data, at, padded, at + 4)
    wide = x[:count].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean() + np.float64(np.float32(1e-5))) * weight[:count]
    np.testing.assert_allclose(out[:count], expected, rtol=5e-7)
    assert (out[count:] == 0).all()
    kept = out.copy()  # in place, as heads are
    rows.normalize(x.ctypes.data, weight.ctypes.data, x.ctypes.data, at, padded, at + 4)
    assert x.tobytes() == kept.tobytes()


@pytest.mark.parametrize("half", [8, 16, 32, 48, 64])
def test_rotate(half):
    x = lined_up(random_rows(1, 2 * half + LANES)[0])
    angles = aligned(2 * (half + LANES), np.float32).reshape(2, -1)
    turn = random_rows(1, half, seed=4)[0].astype(np.float64)
    angles[0, :half], angles[1, :half] = np.cos(turn), np.sin(turn)
    angles[:, half:] = np.nan  # of another position
    before = x.copy()
    rows.rotate(x.ctypes.data, half, angles[0].ctypes.data, angles[1].ctypes.data)
    left, right = before[:half].astype(np.float64), before[half : 2 * half].astype(np.float64)
    expected = [left * np.cos(turn) - right * np.sin(turn)]
    expected.append(right * np.cos(turn) + left * np.sin(turn))
    np.testing.assert_allclose(x[: 2 * half], np.concatenate(expected), atol=1e-6)
    assert x[2 * half :].tobytes() == before[2 * half :].tobytes()


def test_gate_silu():
    gate = lined_up(np.linspace(-120.0, 120.0, 4800, dtype=np.float32))
    up, out = lined_up(random_rows(1, 4800)[0]), aligned(4800, np.float32)
    rows.gate_silu(gate.ctypes.data, up.ctypes.data, out.ctypes.data, 4800)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(out, wide / (1 + np.exp(-wide)) * up, rtol=2e-6, atol=1e-30)


# ---- arithmetic and rounding


@emitted
def _emit_exp(c: Code, x: Int, out: Int) -> None:
    c.store(out, exp(c, c.load(x)))


@emitted
def _emit_exp2(c: Code, x: Int, out: Int) -> None:
    c.store(out, exp2(c, c.load(x)))


@emitted
def _emit_tanh(c: Code, x: Int, out: Int) -> None:
    c.store(out, tanh(c, c.load(x)))


@emitted
def _emit_half(c: Code, x: Int, out: Int) -> None:
    c.store_half(out, c.load(x))


@emitted
def _emit_bfloat(c: Code, x: Int, out: Int) -> None:
    c.store_bfloat(out, c.load(x))


@emitted
def _emit_from_half(c: Code, x: Int, out: Int) -> None:
    c.store(out, c.load_half(x))


@emitted
def _emit_from_bfloat(c: Code, x: Int, out: Int) -> None:
    c.store(out, c.load_bfloat(x))


@njit
def _all_exp(x, out, count):
    for i in range(0, count, LANES):
        _emit_exp(x + i * 4, out + i * 4)


@njit
def _all_exp2(x, out, count):
    for i in range(0, count, LANES):
        _emit_exp2(x + i * 4, out + i * 4)


@njit
def _all_tanh(x, out, count):
    for i in range(0, count, LANES):
        _emit_tanh(x + i * 4, out + i * 4)


@njit
def _narrow(x, half, bfloat, count):
    for i in range(0, count, LANES):
        _emit_half(x + i * 4, half + i * 2)
        _emit_bfloat(x + i * 4, bfloat + i * 2)


@njit
def _widen(half, bfloat, from_half, from_bfloat, count):
    for i in range(0, count, LANES):
        _emit_from_half(half + i * 2, from_half + i * 4)
        _emit_from_bfloat(bfloat + i * 2, from_bfloat + i * 4)


def applied(function, x: np.ndarray) -> np.ndarray:
    source = lined_up(np.resize(x, up_to(x.size, LANES)))
    out = aligned(source.size, np.float32)
    function(source.ctypes.data, out.ctypes.data, source.size)
    return out[: x.size]


def ulps(ours: np.ndarray, exact: np.ndarray) -> float:
    return float((np.abs(ours - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


def test_exp2_up_to_0():
    x = np.concatenate([np.linspace(-125.0, 0.0, 400_001), -np.logspace(-30, 2, 10_000)])
    x = x.astype(np.float32)
    assert ulps(applied(_all_exp2, x), np.exp2(x.astype(np.float64))) <= 3.0


def test_exp():
    x = np.concatenate([np.linspace(-87.0, 88.0, 400_001), np.logspace(-30, 1.9, 10_000)])
    x = x.astype(np.float32)
    assert ulps(applied(_all_exp, x), np.exp(x.astype(np.float64))) <= 2.0


def test_powers_at_the_ends():
    x = np.array([0.0, -0.0, -np.inf, -1e30, -3e38, -125.001, np.nan], np.float32)
    assert applied(_all_exp2, x)[:6].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert np.isnan(applied(_all_exp2, x)[6])
    x = np.array([0.0, -0.0, -np.inf, -1e30, -87.001, 88.0, np.inf, 1e30, np.nan], np.float32)
    top = applied(_all_exp, x)[5]
    assert applied(_all_exp, x)[:8].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, top, top, top]
    assert np.isnan(applied(_all_exp, x)[8])


def test_tanh():
    x = np.linspace(-100.0, 100.0, 200_001).astype(np.float32)
    ours = applied(_all_tanh, x)
    np.testing.assert_allclose(ours, np.tanh(x.astype(np.float64)), atol=3e-7)
    assert applied(_all_tanh, np.array([-np.inf, np.inf], np.float32)).tolist() == [-1.0, 1.0]


def test_narrow_stores_round_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000  # between two bfloats
    half_ties = np.arange(0x3F800000, 0x40000000, 1 << 12, dtype=np.uint32)  # of halves, too
    x = np.concatenate([bits, ties, half_ties]).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, 65504.0, 65519.99, 65520.0, -1e6, 6e-8, 2e-8, 3.4e38]
    x = np.concatenate([x, np.array(special, np.float32)])
    x = lined_up(np.resize(x[~np.isnan(x)], up_to(x.size, LANES)))
    half, bfloat = (aligned(x.size, np.uint16) for _ in range(2))
    _narrow(x.ctypes.data, half.ctypes.data, bfloat.ctypes.data, x.size)
    own = torch.from_numpy(x)
    largest = torch.finfo(torch.float16).max
    halves = own.clamp(-largest, largest).half()  # no infinity comes out of a number
    assert torch.equal(torch.from_numpy(half.view(np.int16)), halves.view(torch.int16))
    assert torch.equal(torch.from_numpy(bfloat.view(np.int16)), own.bfloat16().view(torch.int16))


def test_no_number_stays_no_number_in_narrow_stores():
    x = lined_up(np.full(LANES, np.nan, np.float32))
    half, bfloat = (aligned(x.size, np.uint16) for _ in range(2))
    _narrow(x.ctypes.data, half.ctypes.data, bfloat.ctypes.data, x.size)
    assert torch.from_numpy(half.view(np.int16)).view(torch.float16).isnan().all()
    assert torch.from_numpy(bfloat.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_narrow_loads_are_exact():
    every = lined_up(np.arange(1 << 16, dtype=np.uint16))
    from_half, from_bfloat = (aligned(every.size, np.float32) for _ in range(2))
    at = (array.ctypes.data for array in (every, every, from_half, from_bfloat))
    _widen(*at, every.size)
    own = torch.from_numpy(every.view(np.int16))
    for ours, kind in ((from_half, torch.float16), (from_bfloat, torch.bfloat16)):
        wide = own.view(kind).float()
        assert torch.equal(torch.from_numpy(ours).nan_to_num(7.0), wide.nan_to_num(7.0))
