"""FlashInfer itself on a GPU: `pytest -m gpu`, with the extra `cuda` installed.

Runs only where there is a CUDA device. The same walks as in tests/engine, against the same loops.
"""

import inspect
from types import SimpleNamespace

import flashinfer_stand_in
import pytest
import torch
from attention_cases import LayerKind, Shape, Walk

from kvrelay.engine import cuda_attention
from kvrelay.engine.attention import paged_step
from kvrelay.engine.cuda_attention import FlashInferStep
from kvrelay.engine.step import Slice
from kvrelay.engine.torch_attention import TorchStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's own, not ours to mend
]

KINDS = {
    "plain": [LayerKind()],
    "window": [LayerKind(window=7, scale=0.1)],
    "a window of one": [LayerKind(window=1)],
    "softcap": [LayerKind(softcap=5.0, scale=0.1)],
    "layers that differ": [LayerKind(window=5, softcap=5.0), LayerKind(scale=0.05), LayerKind()],
}
# Rounding of the queries, keys and values is in the expected values, too; this is the arithmetic's.
ERROR_MAX = {torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.fixture
def flashinfer():
    return pytest.importorskip("flashinfer")


@pytest.mark.parametrize("name", ["__init__", "plan", "run"])
def test_the_stand_in_has_the_signatures_of_the_real_one(flashinfer, name):
    theirs, ours = (
        inspect.signature(getattr(owner.BatchPrefillWithPagedKVCacheWrapper, name)).parameters
        for owner in (flashinfer, flashinfer_stand_in)
    )
    by_place = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(by_place)] == by_place
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize("dtype", ERROR_MAX)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_mix_of_prefill_and_decode_sees_what_it_should(flashinfer, block_size, kinds, dtype):
    walk = Walk(Shape(14, 2, 64, block_size), KINDS[kinds], dtype=dtype, device="cuda")
    assert cuda_attention.usable(walk.pool)
    assert walk.error(walk.run(FlashInferStep)) < ERROR_MAX[dtype]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (8, 1), (6, 2)])
def test_every_shape_of_head(flashinfer, head_dim, q_heads, kv_heads):
    shape = Shape(q_heads, kv_heads, head_dim, 16)
    walk = Walk(shape, KINDS["layers that differ"], dtype=torch.bfloat16, device="cuda")
    assert walk.error(walk.run(FlashInferStep)) < ERROR_MAX[torch.bfloat16]


def test_a_long_context_is_split_and_put_together_again(flashinfer):
    length, block_size = 20_000, 16
    blocks = torch.randperm(length // block_size).tolist()
    pool = torch.randn(len(blocks), 2, 2, block_size, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.randn(1, 8, 128, dtype=torch.float16, device="cuda")
    k, v = (torch.randn(1, 2, 128, dtype=torch.float16, device="cuda") for _ in range(2))
    slices = [Slice([0], length - 1, blocks)]
    rows = [
        step(pool, slices).attend(1, q, k, v, 0.1, None, None)
        for step in (TorchStep, FlashInferStep)
    ]
    assert torch.allclose(*rows, atol=ERROR_MAX[torch.float16])


def test_what_is_chosen_on_a_gpu(flashinfer):
    narrow = torch.zeros(2, 1, 2, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    slices = [Slice([0], 0, [1])]
    for kv, kind in ((narrow, FlashInferStep), (narrow.float(), TorchStep)):
        pool = SimpleNamespace(kv=kv, layout=SimpleNamespace(dtype=str(kv.dtype)))
        assert isinstance(paged_step(pool, slices), kind)


@pytest.mark.parametrize("kinds", KINDS)
def test_plain_torch_on_a_gpu(kinds):
    walk = Walk(Shape(), KINDS[kinds], device="cuda")
    assert walk.error(walk.run(TorchStep)) < 1e-3  # a GPU may multiply float32 in tf32
