"""Attention over an int8 pool: each kernel against its numpy model, the whole against plain loops.

That its bits do not depend on chunks or neighbours is in test_kernel_attention.py and test_bits.py.
"""

import re

import numpy as np
import pytest
import torch
from attention_cases import LayerKind, Shape, naive_attention
from kernel_cases import LongCase, make_pool
from numba import njit

from kvrelay.engine import attention
from kvrelay.engine.kernel_attention import KernelStep
from kvrelay.engine.kernels import int8_head, int8_segment, int8_softmax
from kvrelay.engine.kernels.functions import exp2_coarse, log2
from kvrelay.engine.kernels.int8_head import SCALE_MIN
from kvrelay.engine.kernels.paged import LOG2_E
from kvrelay.engine.kernels.pool import keys_at
from kvrelay.engine.kernels.shuffles import turn_keys
from kvrelay.engine.kernels.threads import Team, aligned
from kvrelay.engine.kernels.vector import LANES, Code, Int, emitted
from kvrelay.engine.plan import pool_record
from kvrelay.engine.shapes import GROUP, up_to
from kvrelay.engine.step import Slice, UnsupportedModelError
from kvrelay.transport.codec import transcode

KEYS = 64
QUAD_BYTES = KEYS * 4
NOT_FINITE = (np.nan, np.inf, -np.inf)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
# Of values around 1: their own rounding, that of scores, that of weights.
ERROR_MAX = 0.06


@pytest.fixture(scope="module")
def team():
    with_helper = Team(2)
    yield with_helper
    with_helper.close()


def filled(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.size, array.dtype)
    copy[:] = array.reshape(-1)
    return copy.reshape(array.shape)


def random_floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# ---- heads


def spread_out(x: np.ndarray) -> np.ndarray:
    """The transform of each 64 numbers of x, in float32, in the order of the kernel."""
    x = x.reshape(-1, GROUP).copy()
    for distance in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(-1, GROUP // (2 * distance), 2, distance)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
    return x.reshape(-1)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    scale = np.maximum(np.abs(x).max() * np.float32(1 / 127), np.float32(SCALE_MIN))
    return np.rint(x * (np.float32(1) / scale)).astype(np.int64), scale


def padded(x: np.ndarray) -> np.ndarray:
    result = np.zeros(up_to(x.size, GROUP), np.float32)
    result[: x.size] = x
    return result


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads_are_their_models_to_the_bit(head_dim, size):
    x = filled(random_floats(head_dim) * np.float32(size))
    wide = up_to(head_dim, GROUP)
    spread, spread_scale = quantized(spread_out(padded(x)))
    out, scale = aligned(wide, np.uint8), aligned(2, np.float32)
    places = out.ctypes.data, scale.ctypes.data
    int8_head.write_key(x.ctypes.data, head_dim, *places)
    assert (out.astype(np.int64) - 128 == spread).all()
    assert scale[0] == spread_scale
    factor = np.array([0.25], np.float32)
    int8_head.write_query(x.ctypes.data, head_dim, factor.ctypes.data, *places)
    assert (out.view(np.int8) == spread).all()
    assert scale[0] == spread_scale * factor[0] / np.float32(64)
    assert scale.view(np.int32)[1] == -128 * spread.sum()
    int8_head.write_value(x.ctypes.data, head_dim, *places)
    whole, own = quantized(padded(x))
    assert (out.view(np.int8) == whole).all()
    assert scale[0] == own


def test_the_transform_leaves_dot_products_alone():
    a, b = random_floats(2, 128)
    product = spread_out(a).astype(np.float64) @ spread_out(b).astype(np.float64)
    assert product / 64 == pytest.approx(a.astype(np.float64) @ b, rel=1e-5)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_head_with_what_is_no_number_becomes_zeros(bad):
    x = filled(random_floats(128))
    x[5] = bad
    out, scale = aligned(128, np.uint8), aligned(1, np.float32)
    for write, zero in ((int8_head.write_key, 128), (int8_head.write_value, 0)):
        write(x.ctypes.data, 128, out.ctypes.data, scale.ctypes.data)
        assert scale[0] == SCALE_MIN
        assert (out == zero).all()


def test_a_head_of_the_largest_numbers_has_a_finite_scale():
    x = filled(random_floats(64))
    x[5] = 3e38
    out, scale = aligned(64, np.uint8), aligned(1, np.float32)
    for write, largest in ((int8_head.write_key, 255), (int8_head.write_value, 127)):
        write(x.ctypes.data, 64, out.ctypes.data, scale.ctypes.data)
        assert np.isfinite(scale[0])
        assert out[5] == largest


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_blocks_made_int8_on_the_way_have_finite_scales(bad):
    """Of the codec: the vector with a number that is not finite is zeros, others are their own."""
    shape = Shape(head_dim=64)
    here, there = (make_pool(shape, dtype, 1, litter=0.0) for dtype in ("float32", "int8"))
    back = make_pool(shape, "float32", 1)
    here.kv.copy_(torch.from_numpy(random_floats(*here.kv.shape)))
    broken = torch.zeros(here.layout.block_shape[:-1], dtype=torch.bool)
    for place in ((0, 0, 1, 0), (1, 1, 2, 1)):  # layer, side, slot, head
        broken[place] = True
        here.kv[0][place][7] = bad
    blocks = [torch.from_numpy(pool.bytes[0]) for pool in (here, there, back)]
    layouts = [pool.layout for pool in (here, there, back)]
    transcode(blocks[0], layouts[0], blocks[1], layouts[1])
    transcode(blocks[1], layouts[1], blocks[2], layouts[2])
    layout = there.layout
    scales = there.bytes.reshape(-1, layout.side_bytes)[:, layout.vectors_bytes :]
    used = layout.kv_heads * layout.block_size * 4
    found = scales[:, :used].copy().view(np.float32)
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert (back.kv[0][broken] == 0.0).all()
    assert (back.kv[0][~broken] - here.kv[0][~broken]).abs().max() < 0.06


# ---- panels and products


@njit
def _turn(keys, values, stride, key_panel, value_panel):
    for at in range(0, KEYS, LANES):
        turn_keys(keys + at * stride, stride, key_panel + at * 4, QUAD_BYTES, 0, 0, 0)
        int8_segment._turn_values(values + at * stride, stride, value_panel + at * 64)


def test_panels_hold_quads_of_dimensions_and_quads_of_keys():
    keys, values = filled(random_bytes(KEYS, 128)), filled(random_bytes(KEYS, 128, seed=1))
    panels = [aligned(KEYS * GROUP, np.uint8) for _ in range(2)]
    _turn(keys.ctypes.data, values.ctypes.data, 128, *(panel.ctypes.data for panel in panels))
    of_keys = keys[:, :GROUP].reshape(KEYS, GROUP // 4, 4).transpose(1, 0, 2)
    assert (panels[0].reshape(of_keys.shape) == of_keys).all()
    of_values = values[:, :GROUP].reshape(KEYS // 4, 4, GROUP).transpose(0, 2, 1)
    assert (panels[1].reshape(of_values.shape) == of_values).all()


@pytest.mark.parametrize("vnni", [False, True])
def test_products_are_exact_with_and_without_vnni(vnni, monkeypatch):
    if vnni and not int8_segment.HAS_VNNI:
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(int8_segment, "HAS_VNNI", vnni)

    @njit
    def score(rows, quads, q, stride, scales, keys, out):
        int8_segment._score(rows, quads, q, stride, scales, keys, out)

    @njit
    def add(rows, quads, weights, values, shrinks, factors, totals):
        int8_segment._add_weighted(rows, quads, weights, values, shrinks, factors, totals, 256)

    for rows in range(1, 7):
        first, second = filled(random_bytes(6, 128)), filled(random_bytes(32, KEYS, 4, seed=1))
        scales = filled(np.arange(12, dtype=np.int32) * 7 - 40)
        dots = aligned(6 * KEYS, np.int32)
        score(
            rows, 32, first.ctypes.data, 128, scales.ctypes.data, second.ctypes.data,
            dots.ctypes.data,
        )  # fmt: skip
        signed = first.view(np.int8).reshape(6, 32, 4).astype(np.int64)
        expected = np.einsum("rqi,qki->rk", signed, second.astype(np.int64)) + scales[1::2, None]
        assert (dots.reshape(6, KEYS)[:rows] == expected[:rows]).all()
        weights, values = filled(random_bytes(6, KEYS)), filled(random_bytes(16, 64, 4, seed=2))
        shrinks, factors = random_floats(2, 6)
        before = random_floats(6, 64, seed=3)
        totals = filled(before)
        add(
            rows, 16, weights.ctypes.data, values.ctypes.data, shrinks.ctypes.data,
            factors.ctypes.data, totals.ctypes.data,
        )  # fmt: skip
        sums = np.einsum(
            "rqi,qoi->ro",
            weights.reshape(6, 16, 4).astype(np.int64),
            values.view(np.int8).astype(np.int64),
        )
        expected = before * shrinks[:, None] + sums * factors[:, None].astype(np.float64)
        np.testing.assert_allclose(totals[:rows], expected[:rows], rtol=1e-5, atol=1e-3)
        assert (totals[rows:] == before[rows:]).all()


# ---- softmax


@emitted
def _log2(c: Code, x: Int, out: Int) -> None:
    c.store(out, log2(c, c.load(x)))


@emitted
def _exp2(c: Code, x: Int, out: Int) -> None:
    c.store(out, exp2_coarse(c, c.load(x)))


@njit
def _all(which, x, out, count):
    for at in range(0, count * 4, LANES * 4):
        if which:
            _log2(x + at, out + at)
        else:
            _exp2(x + at, out + at)


def applied(which: int, x: np.ndarray) -> np.ndarray:
    x = filled(np.resize(x.astype(np.float32), up_to(x.size, LANES)))
    out = aligned(x.size, np.float32)
    _all(which, x.ctypes.data, out.ctypes.data, x.size)
    return out


def test_log2():
    x = np.exp2(np.linspace(-125, 125, 100_000)).astype(np.float32)[: 100_000 // LANES * LANES]
    error = np.abs(applied(1, x) - np.log2(x.astype(np.float64)))
    assert (error / np.maximum(1, np.abs(np.log2(x)))).max() < 3e-7


def test_coarse_powers():
    x = np.linspace(-125, 20, 16 * 5000).astype(np.float32)
    np.testing.assert_allclose(applied(0, x), np.exp2(x.astype(np.float64)), rtol=1e-4)
    far = applied(0, np.array([-125.01, -1e10, -3e38, -np.inf] * 4))
    assert (far == 0.0).all()


@njit
def _softmax(dots, scale, scales, first, last, softcap, top, weights, total):
    if softcap:
        int8_softmax.score_capped(dots, scale, scales, first, last, softcap, top)
    elif first > 0 or last < KEYS - 1:
        int8_softmax.score_some(dots, scale, scales, first, last, top)
    else:
        int8_softmax.score_all(dots, scale, scales, top)
    int8_softmax.weigh(dots, scales, top, weights, total)


def softmax(dots, scales, scale, first=0, last=KEYS - 1, softcap=0.0):
    """One row of one tile: its largest score, its weights as bytes, and their sum."""
    dots, scales = filled(dots), filled(scales)
    numbers = np.array([scale, softcap], np.float32)
    top, total = (aligned(LANES, np.float32) for _ in range(2))
    weights = aligned(KEYS, np.uint8)
    at = numbers.ctypes.data
    _softmax(
        dots.ctypes.data, at, scales.ctypes.data, first, last, at + 4 if softcap else 0,
        top.ctypes.data, weights.ctypes.data, total.ctypes.data,
    )  # fmt: skip
    return top[0], weights, total[0]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("first", "last"), [(0, 63), (0, 70), (0, 17), (40, 41), (63, 63)])
def test_weights_are_bytes_of_the_row_s_own_largest(first, last, softcap):
    dots = np.random.default_rng(1).integers(-90_000, 90_000, KEYS).astype(np.int32)
    key_scales, value_scales = np.abs(random_floats(2, KEYS)) + np.float32(0.01)
    scales = np.stack([key_scales, np.log2(value_scales), 1 / value_scales])
    scale = np.float32(1e-4)
    top, weights, total = softmax(dots, scales, scale, first, last, softcap)
    scores = dots.astype(np.float64) * key_scales * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    seen = (np.arange(KEYS) >= first) & (np.arange(KEYS) <= last)
    exact = np.where(seen, np.exp2(scores) * value_scales, 0.0)
    assert np.abs(weights - 255 * exact / exact.max()).max() < 0.53
    assert weights.max() == 255
    assert (weights[~seen] == 0).all()
    assert top == pytest.approx(np.log2(exact.max()), abs=1e-4)
    own_sum = np.where(seen, np.exp2(scores), 0.0).sum()
    assert total * 2.0**top == pytest.approx(255 * own_sum, rel=2e-4)


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_weight_is_255_however_large_the_scores(seed):
    """Around 1e5 floats are 2^-7 apart, at 5e5 2^-5: a weight must not be rounded past a byte."""
    rng = np.random.default_rng(seed)
    dots = rng.integers(900_000_000, 1_100_000_000, KEYS).astype(np.int32)
    value_scales = rng.uniform(0.5, 2, KEYS).astype(np.float32)
    scales = np.stack([np.ones(KEYS, np.float32), np.log2(value_scales), 1 / value_scales])
    top, weights, total = softmax(dots, scales, rng.uniform(1e-4, 5e-4))
    assert 9e4 < top < 6e5
    assert weights.max() == 255
    assert weights[dots.argmax()] > 0
    assert 0 < total < np.inf


# ---- the whole


@pytest.mark.parametrize("block_size", [5, 16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_it_is_near_the_naive_answer(head_dim, block_size, team):
    for kind in (LayerKind(), LayerKind(window=70), LayerKind(window=9, softcap=2.0)):
        kind = LayerKind(kind.window, kind.softcap, head_dim**-0.5)
        case = LongCase(Shape(6, 2, head_dim, block_size), kind, 150, "int8")
        expected = case.expected()
        for sizes in ((150,), (1,), (2, 61, 67)):
            answer = case.run(case.chunks(sizes), team, neighbours=True)
            assert (answer - expected).abs().max() < ERROR_MAX, (kind, sizes)


def test_more_query_heads_than_a_tile_of_queries(team):
    case = LongCase(Shape(100, 1, 32, 16), LayerKind(), 70, "int8")
    answer = case.run(case.chunks((1, 30)), team)
    assert (answer - case.expected()).abs().max() < ERROR_MAX


def test_dimensions_that_stand_out_cost_the_others_nothing(team):
    """As keys of trained models have them: a hundred times the rest, and the same in all keys."""
    case = LongCase(Shape(4, 2, 64, 16), LayerKind(scale=0.3), 150, "int8")
    case._own[1][:, :, 7] += 100.0  # adds to all scores of a query alike: changes nothing
    error = (case.run(case.chunks((150,)), team) - case.expected()).abs()
    assert error.mean() < 0.03


def test_a_step_writes_its_own_positions_alone(team):
    shape = Shape(head_dim=32, block_size=4)
    pool = make_pool(shape, "int8", 4, layers=1)
    k, v = (torch.from_numpy(random_floats(3, 2, 32, seed=n)) for n in range(2))
    KernelStep(pool, team, [Slice([0] * 3, 2, [2, 1])]).attend(
        0, torch.zeros(3, 4, 32), k, v, 1.0, None, None
    )
    assert (pool.bytes[[0, 3]] == 255).all()
    layout = pool.layout
    sides = pool.bytes.reshape(4, 2, layout.side_bytes)
    vectors = sides[:, :, : layout.vectors_bytes].reshape(4, 2, 2, 4, layout.head_bytes)
    ends = layout.vectors_bytes + 2 * 4 * 4
    scales = sides[:, :, layout.vectors_bytes : ends].copy().view(np.float32).reshape(4, 2, 2, 4)
    for token, (block, slot) in enumerate([(2, 2), (2, 3), (1, 0)]):
        own = vectors[block, 1, :, slot, :32].view(np.int8) * scales[block, 1, :, slot, None]
        np.testing.assert_allclose(own, v[token].numpy(), atol=0.02)
    assert (vectors[2, :, :, :2] == 255).all()
    assert np.isnan(scales[2, :, :, :2]).all()
    assert (vectors[1, :, :, 1:] == 255).all()


def test_blocks_of_heads_of_whole_lines_begin_at_lines():
    pool = make_pool(Shape(head_dim=80, block_size=3), "int8", 5)
    record, tables = pool_record(pool)[0], np.arange(5)
    for layer in range(2):
        for position in range(15):
            assert keys_at(record, tables, 0, layer, position) % 64 == 0


def test_heads_that_no_kernel_takes_are_refused_in_one_line(team):
    pool = make_pool(Shape(head_dim=40), "int8", 4)
    said = (
        "KV in int8 is for a CPU and heads of a multiple of 16 values, not for heads of 40 on cpu"
    )
    for own_team in (team, None):
        with pytest.raises(UnsupportedModelError, match=re.escape(said)):
            attention.paged_step(pool, [Slice([1], 0, [0])], None, own_team)


def test_a_row_that_is_no_number_spoils_no_other(team):
    shape, count = Shape(head_dim=64, block_size=16), 40
    q, k, v = (torch.from_numpy(random_floats(count, n, 64, seed=n)) for n in (4, 2, 3))
    v = v[:, :2].contiguous()
    broken = q.clone()
    broken[7] = float("nan")
    answers = []
    for queries in (q, broken):
        pool = make_pool(shape, "int8", 4)
        step = KernelStep(pool, team, [Slice([0] * count, 0, [0, 1, 2])])
        answers.append(step.attend(0, queries, k, v, 0.125, None, None))
    others = [row for row in range(count) if row != 7]
    assert torch.equal(answers[0][others], answers[1][others])
    assert answers[1][7].isnan().all()
    assert (answers[0] - naive_attention(q, k, v, LayerKind(scale=0.125))).abs().max() < ERROR_MAX


@pytest.mark.parametrize("score", [1e5, 2.3e5, 5e5])
def test_scores_of_any_size_give_the_right_answer(score, team):
    """Keys in one direction, twice each of many lengths: each row is the values of the longest two
    that it sees, or of one."""
    length, pairs = 150, 75
    case = LongCase(Shape(4, 2, 64, 16), LayerKind(scale=1.0), length, "int8")
    q, k, _ = case._own
    rng = np.random.default_rng(int(score))
    direction = torch.from_numpy(rng.choice([-1.0, 1.0], 64).astype(np.float32))
    sizes = 0.2 + 0.8 * rng.permutation(np.repeat(np.arange(1, pairs + 1), 2)) / pairs
    k[:] = direction * torch.from_numpy(sizes.astype(np.float32))[:, None, None]
    q[:] = 0.3 * q + direction
    q *= score / LOG2_E / (q @ direction).unsqueeze(-1)
    expected = case.expected()
    assert expected.square().mean(-1).sqrt().min() > 0.4, "a row near zero would prove nothing"
    for chunks in ((150,), (1,), (2, 61)):
        assert (case.run(case.chunks(chunks), team) - expected).abs().max() < ERROR_MAX


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_value_that_is_no_number_spoils_no_row_of_other_tokens(head_dim, bad, team):
    """Those before it do not see it; those after it find zeros there, with the weight it has."""
    kind = LayerKind(scale=head_dim**-0.5)
    case = LongCase(Shape(4, 2, head_dim, 16), kind, 150, "int8")
    values = case._own[2]
    values[70] = 0.0
    expected = case.expected()
    values[70, :, 3] = bad
    for chunks in ((150,), (1,), (2, 61)):
        answer = case.run(case.chunks(chunks), team, neighbours=True)
        assert (answer - expected).abs().max() < ERROR_MAX
