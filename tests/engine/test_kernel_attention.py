"""Attention over the block pool by the compiled kernels: right, and to the bit the same however a
sequence is cut, whoever is beside it and however many threads share the work."""

import random

import pytest
import torch
from attention_cases import LayerKind, Shape, Walk
from kernel_cases import LongCase, make_pool

from kvrelay.engine import attention, kernel_attention
from kvrelay.engine.kernel_attention import KernelStep
from kvrelay.engine.kernels.threads import Team
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.engine.torch_attention import TorchStep
from kvrelay.kv.pool import TORCH_DTYPES

ERROR_MAX = 1e-5

KINDS = {
    "plain": [LayerKind()],
    "window": [LayerKind(window=7)],
    "a window of one": [LayerKind(window=1)],
    "a window longer than any sequence": [LayerKind(window=1000)],
    "softcap": [LayerKind(softcap=1.5)],
    "layers that differ": [LayerKind(window=5, softcap=2.0), LayerKind(softcap=2.0), LayerKind()],
}
HEADS = {
    "as many": (4, 4),
    "shared by two": (4, 2),
    "shared by three": (9, 3),
    "shared by seven": (14, 2),
    "one": (5, 1),
    "more than a tile of queries": (100, 1),
}
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def team():
    with_helper = Team(2)
    yield with_helper
    with_helper.close()


def walk_error(
    shape: Shape,
    kinds: list[LayerKind],
    team: Team,
    *,
    dtype: str = "float32",
    litter: float = float("nan"),
    decode_share: float = 0.5,
    seed: int = 0,
) -> float:
    """How far KernelStep is from the naive answer, over a pool of `dtype`."""
    walk = Walk(shape, kinds, seed=seed)
    pool = make_pool(shape, dtype, len(walk.pool), layers=len(kinds), litter=litter)
    walk.pool = pool.kv
    walk.k, walk.v = (
        [rows.to(TORCH_DTYPES[dtype]).float() for rows in side] for side in (walk.k, walk.v)
    )
    return walk.error(walk.run(lambda _, slices: KernelStep(pool, team, slices), decode_share))


@pytest.mark.parametrize("block_size", [1, 4, 5, 16])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_mix_of_prefill_and_decode_sees_what_it_should(kinds, block_size, team):
    shape = Shape(block_size=block_size, head_dim=16)
    assert walk_error(shape, KINDS[kinds], team, seed=block_size) < ERROR_MAX


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kinds", ["plain", "layers that differ"])
def test_query_heads_share_kv_heads(kinds, heads, team):
    q_heads, kv_heads = HEADS[heads]
    shape = Shape(q_heads=q_heads, kv_heads=kv_heads, head_dim=32)
    assert walk_error(shape, KINDS[kinds], team) < ERROR_MAX


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_head_and_type_of_kv(dtype, head_dim, team):
    kinds = [LayerKind(scale=head_dim**-0.5), LayerKind(window=9, scale=head_dim**-0.5)]
    for block_size in (4, 16):
        shape = Shape(head_dim=head_dim, block_size=block_size)
        assert walk_error(shape, kinds, team, dtype=dtype) < ERROR_MAX


@pytest.mark.parametrize("decode_share", [0.0, 1.0])
def test_chunks_alone_and_single_tokens_alone(decode_share, team):
    shape = Shape(head_dim=16)
    error = walk_error(shape, KINDS["layers that differ"], team, decode_share=decode_share)
    assert error < ERROR_MAX


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("litter", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("block_size", [5, 32])
def test_what_others_left_in_the_pool_does_not_matter(litter, dtype, block_size, team):
    shape = Shape(block_size=block_size, head_dim=16)
    for kinds in ("plain", "softcap", "window"):
        assert walk_error(shape, KINDS[kinds], team, dtype=dtype, litter=litter) < ERROR_MAX


@pytest.mark.parametrize("length", [63, 64, 65, 66, 128, 255, 256, 257, 258, 513, 700])
def test_contexts_that_cross_tiles_and_segments(length, team):
    for kind in (LayerKind(), LayerKind(window=60), LayerKind(window=257, softcap=3.0)):
        case = LongCase(Shape(head_dim=16, block_size=5), kind, length)
        expected = case.expected()
        for sizes in ((length,), (1,), (2, 61, 64, 67, 255)):
            error = (case.run(case.chunks(sizes), team) - expected).abs().max()
            assert error < ERROR_MAX, sizes


@pytest.mark.parametrize("scale", [1e-6, 3.0, 100.0])
def test_scores_of_any_size(scale, team):
    case = LongCase(Shape(head_dim=64, block_size=16), LayerKind(scale=scale), 150)
    # Scores are around 8 * scale, up to four times that, and rounded to 6e-8 of it.
    error_max = max(ERROR_MAX, 1e-5 * scale)
    assert (case.run(case.chunks((150,)), team) - case.expected()).abs().max() < error_max


BITS = {
    "plain": (Shape(head_dim=64, block_size=16), LayerKind(), 530, "float32"),
    "a window": (Shape(head_dim=16, block_size=4), LayerKind(window=100), 400, "float32"),
    "a window over segments": (Shape(head_dim=32), LayerKind(window=300), 700, "float32"),
    "softcap": (Shape(4, 4, 32, 5), LayerKind(softcap=2.0), 270, "float32"),
    "a group of seven": (Shape(7, 1, 32, 1), LayerKind(), 270, "float32"),
    "a group of three, half": (Shape(6, 2, 80, 5), LayerKind(window=70), 270, "float16"),
    "bfloat": (Shape(4, 2, 128, 16), LayerKind(), 270, "bfloat16"),
    "int8": (Shape(6, 2, 64, 16), LayerKind(), 530, "int8"),
    "int8, a window": (Shape(7, 1, 96, 5), LayerKind(window=100), 400, "int8"),
    "int8, softcap": (Shape(4, 2, 32, 1), LayerKind(softcap=2.0), 270, "int8"),
    "int8, a window over segments": (Shape(2, 2, 128, 48), LayerKind(window=300), 700, "int8"),
}


@pytest.mark.parametrize("name", BITS)
def test_a_token_has_the_same_bits_in_any_chunk_and_as_a_decode_step(name, team):
    case = LongCase(*BITS[name])
    alone, three = Team(1), Team(3)
    whole = case.run([(0, case.length)], alone)
    assert torch.equal(case.run(case.chunks((1,)), alone), whole), "token by token"
    for sizes in ((2,), (14, 15), (1, 3, 17), (47, 64), (1, 100, 256)):
        assert torch.equal(case.run(case.chunks(sizes), team, neighbours=True), whole), sizes
    assert torch.equal(case.run([(0, case.length)], three), whole), "three threads"
    assert torch.equal(case.run(case.chunks((1, 30)), three, neighbours=True), whole)
    for other in (alone, three):
        other.close()


def test_random_cases_are_right_and_the_same_in_two_chunkings(team):
    rng = random.Random(1)
    for seed in range(25):
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 7))
        head_dim, block_size = rng.choice((16, 32, 48, 64, 80)), rng.choice((1, 3, 4, 5, 16, 64))
        kind = LayerKind(rng.choice((None, None, 1, 30, 65)), rng.choice((None, None, 2.0)))
        shape = Shape(kv_heads * group, kv_heads, head_dim, block_size)
        case = LongCase(shape, kind, rng.randint(1, 330), rng.choice(DTYPES), seed)
        answers = [
            case.run(case.chunks(sizes), team, neighbours=True)
            for sizes in ((rng.randint(1, 90), 1), (rng.randint(1, 300),))
        ]
        assert torch.equal(*answers), (shape, kind, case.length, case.dtype)
        if seed % 5 == 0:
            assert (answers[0] - case.expected()).abs().max() < ERROR_MAX


def test_it_agrees_with_plain_torch(team):
    shape = Shape(head_dim=16)
    walk, other = (Walk(shape, KINDS["layers that differ"]) for _ in range(2))
    pool = make_pool(shape, "float32", len(walk.pool), layers=3)
    walk.pool = pool.kv
    ours = walk.run(lambda _, slices: KernelStep(pool, team, slices))
    for a, b in zip(ours, other.run(TorchStep), strict=True):
        assert torch.allclose(a, b, atol=ERROR_MAX)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype, team):
    """Queries, keys and values in the pool's own narrow type, as GPUs have them."""
    shape = Shape(head_dim=16)
    walk = Walk(shape, KINDS["layers that differ"], dtype=dtype)
    pool = make_pool(shape, str(dtype).removeprefix("torch."), len(walk.pool), layers=3)
    walk.pool = pool.kv
    assert walk.error(walk.run(lambda _, slices: KernelStep(pool, team, slices))) < 0.02


def test_a_step_writes_nothing_but_its_own_slots(team):
    shape = Shape(head_dim=16)
    walk = Walk(shape, KINDS["plain"])
    pool = make_pool(shape, "float32", len(walk.pool), layers=1, litter=7.0)
    walk.pool = pool.kv
    parts = [(0, 0, 6), (2, 0, 3), (1, 0, 1)]
    walk.attend(KernelStep(pool, team, walk.slices(parts)), parts, 0)
    mine = [*walk.blocks[0][:2], walk.blocks[2][0], walk.blocks[1][0]]
    others = [block for block in range(pool.blocks) if block not in mine]
    assert (pool.kv[others] == 7.0).all()
    assert torch.equal(pool.kv[mine[0], 0, 0], walk.k[0][0, :4])
    assert torch.equal(pool.kv[mine[1], 0, 1, :2], walk.v[0][0, 4:6])


def test_a_cancelled_step_ends_between_two_layers(team):
    shape = Shape(head_dim=16)
    walk = Walk(shape, KINDS["layers that differ"])
    pool = make_pool(shape, "float32", len(walk.pool), layers=3)
    walk.pool = pool.kv
    cancelled, parts = CancelFlag(), [(0, 0, 4)]
    step = KernelStep(pool, team, walk.slices(parts), cancelled)
    walk.attend(step, parts, 0)
    cancelled.set()
    with pytest.raises(StepCancelledError):
        walk.attend(step, parts, 1)
    assert pool.kv[walk.blocks[0][0], 1].isnan().all(), "the layer after must not be written"


def test_heads_that_fill_no_vector_go_the_plain_way(team):
    shapes = {8: TorchStep, 16: KernelStep, 40: TorchStep, 80: KernelStep}
    for head_dim, kind in shapes.items():
        pool = make_pool(Shape(head_dim=head_dim), "float32", 4)
        assert kernel_attention.usable(pool) == (kind is KernelStep)
        assert type(attention.paged_step(pool, [Slice([1], 0, [0])], None, team)) is kind
