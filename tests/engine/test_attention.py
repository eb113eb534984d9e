"""Attention over the block pool against plain loops over heads and queries."""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import LayerKind, Shape, Walk

from kvrelay.engine.attention import paged_step
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.engine.torch_attention import TorchStep

ERROR_MAX = 1e-5

KINDS = {
    "plain": [LayerKind()],
    "window": [LayerKind(window=7)],
    "a window of one": [LayerKind(window=1)],
    "a window longer than any sequence": [LayerKind(window=1000)],
    "softcap": [LayerKind(softcap=1.5)],
    "layers that differ": [LayerKind(window=5, softcap=2.0), LayerKind(softcap=2.0), LayerKind()],
}
HEADS = {"as many": (4, 4), "shared by two": (4, 2), "shared by seven": (14, 2), "one": (5, 1)}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_mix_of_prefill_and_decode_sees_what_it_should(kinds, block_size):
    walk = Walk(Shape(block_size=block_size), KINDS[kinds], seed=block_size)
    assert walk.error(walk.run(TorchStep)) < ERROR_MAX


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kinds", ["plain", "layers that differ"])
def test_query_heads_share_kv_heads(kinds, heads):
    q_heads, kv_heads = HEADS[heads]
    walk = Walk(Shape(q_heads=q_heads, kv_heads=kv_heads), KINDS[kinds])
    assert walk.error(walk.run(TorchStep)) < ERROR_MAX


@pytest.mark.parametrize("decode_share", [0.0, 1.0])
def test_chunks_alone_and_single_tokens_alone(decode_share):
    walk = Walk(Shape(), KINDS["layers that differ"])
    assert walk.error(walk.run(TorchStep, decode_share)) < ERROR_MAX


@pytest.mark.parametrize("litter", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kinds", ["plain", "softcap"])
def test_what_others_left_in_the_pool_does_not_matter(kinds, litter):
    walk = Walk(Shape(block_size=16), KINDS[kinds], litter=litter)
    assert walk.error(walk.run(TorchStep)) < ERROR_MAX


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    walk = Walk(Shape(), KINDS["layers that differ"], dtype=dtype)
    assert walk.error(walk.run(TorchStep)) < 0.02


def test_a_narrow_pool_shows_a_token_the_same_at_hand_and_read_back():
    whole, cut = (Walk(Shape(), KINDS["plain"]) for _ in range(2))
    for walk in (whole, cut):
        walk.pool = walk.pool.bfloat16()
    parts = [(0, 0, 37)]
    at_once = whole.attend(TorchStep(whole.pool, whole.slices(parts)), parts, 0)
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 20), (20, 37)):
        parts = [(0, start, end)]
        pieces.append(cut.attend(TorchStep(cut.pool, cut.slices(parts)), parts, 0))
    assert torch.allclose(at_once, torch.cat(pieces), atol=ERROR_MAX)


def test_a_step_writes_nothing_but_its_own_slots():
    walk = Walk(Shape(block_size=4), KINDS["plain"], litter=7.0)
    parts = [(0, 0, 6), (2, 0, 3)]
    walk.attend(TorchStep(walk.pool, walk.slices(parts)), parts, 0)
    # Two blocks for 6 tokens and one for 3; what they do not fill is zero.
    mine = [*walk.blocks[0][:2], walk.blocks[2][0]]
    others = [block for block in range(len(walk.pool)) if block not in mine]
    assert (walk.pool[others] == 7.0).all()
    assert torch.equal(walk.pool[mine[0], 0, 0], walk.k[0][0, :4])
    assert torch.equal(walk.pool[mine[1], 0, 1, :2], walk.v[0][0, 4:6])
    assert (walk.pool[mine[1], :, :, 2:] == 0).all()
    assert (walk.pool[mine[2], :, :, 3:] == 0).all()


def test_the_rest_of_a_block_is_cleared_only_on_entering_it():
    walk = Walk(Shape(block_size=4), KINDS["plain"])
    first = [(0, 0, 2)]
    walk.attend(TorchStep(walk.pool, walk.slices(first)), first, 0)
    TorchStep(walk.pool, walk.slices([(0, 2, 3)]))
    assert torch.equal(walk.pool[walk.blocks[0][0], 0, 0, :2], walk.k[0][0, :2])


def test_a_cancelled_step_ends_between_two_layers():
    walk = Walk(Shape(), KINDS["layers that differ"])
    cancelled = CancelFlag()
    parts = [(0, 0, 4)]
    step = TorchStep(walk.pool, walk.slices(parts), cancelled)
    walk.attend(step, parts, 0)
    cancelled.set()
    with pytest.raises(StepCancelledError):
        walk.attend(step, parts, 1)
    assert walk.pool[walk.blocks[0][0], 1].isnan().all(), "the layer after must not be written"


def test_a_step_knows_its_slices_and_positions():
    slices = [Slice([5, 6], 3, [2, 0]), Slice([9], 0, [1])]
    layout = SimpleNamespace(dtype="float32")
    step = paged_step(SimpleNamespace(kv=torch.zeros(3, 1, 2, 4, 2, 8), layout=layout), slices)
    assert step.positions.tolist() == [3, 4, 0]
    assert step.slices is slices
