"""How FlashInferStep uses FlashInfer, shown with a stand-in: index arrays, plans, and the choice.

No test here runs FlashInfer; tests/gpu/test_cuda_attention.py does, where there is a GPU.
"""

import logging
import random
import sys
from itertools import pairwise
from types import SimpleNamespace

import flashinfer_stand_in
import pytest
import torch
from attention_cases import LayerKind, Shape, Walk

from kvrelay.engine import attention, cuda_attention
from kvrelay.engine.cuda_attention import FlashInferStep, page_arrays
from kvrelay.engine.step import Slice
from kvrelay.engine.torch_attention import TorchStep

KINDS = {
    "plain": [LayerKind()],
    "window": [LayerKind(window=7)],
    "a window of one": [LayerKind(window=1)],
    "softcap": [LayerKind(softcap=1.5)],
    "layers that differ": [LayerKind(window=5, softcap=2.0), LayerKind(scale=0.1), LayerKind()],
}


@pytest.fixture
def fresh(monkeypatch):
    """No verdict, workspace or wrapper of another test, and a small workspace."""
    monkeypatch.setattr(cuda_attention, "_verdicts", {})
    monkeypatch.setattr(cuda_attention, "_kernels", {})
    monkeypatch.setattr(cuda_attention, "_WORKSPACE_BYTES", 16)


@pytest.fixture
def stand_in(fresh, monkeypatch):
    module = flashinfer_stand_in.module()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module.BatchPrefillWithPagedKVCacheWrapper


# ---- index arrays


def expand(arrays: cuda_attention.PageArrays, block_size: int) -> list[list[tuple[int, int]]]:
    """(block, slot) of every position that each slice's last query may look at."""
    seen = []
    for index, last in enumerate(arrays.last_page_len.tolist()):
        first, stop = arrays.kv_indptr[index : index + 2].tolist()
        pages = arrays.kv_indices[first:stop].tolist()
        used = [block_size] * (len(pages) - 1) + [last]
        seen.append(
            [(page, slot) for page, n in zip(pages, used, strict=True) for slot in range(n)]
        )
    return seen


@pytest.mark.parametrize("seed", range(20))
def test_index_arrays_name_every_position_once_and_in_order(seed):
    rng = random.Random(seed)
    block_size = rng.choice((1, 3, 4, 16))
    slices = []
    for _ in range(rng.randint(1, 6)):
        start, size = rng.choice((0, 1, 15, 16, 17, 40)), rng.choice((1, 1, 2, 16, 33))
        room = -(-(start + size) // block_size) + rng.choice((0, 3))  # reserved ahead, too
        slices.append(Slice([0] * size, start, rng.sample(range(1000), room)))
    arrays = page_arrays(slices, block_size)
    assert expand(arrays, block_size) == [
        [(s.blocks[at // block_size], at % block_size) for at in range(s.end)] for s in slices
    ]
    rows = arrays.qo_indptr.tolist()
    assert rows[0] == 0
    sizes = [stop - start for start, stop in pairwise(rows)]
    assert sizes == [len(s.tokens) for s in slices]


def test_index_arrays_of_a_step_by_hand():
    arrays = page_arrays([Slice([0] * 3, 2, [7, 4]), Slice([0], 8, [1, 9, 3, 5])], 4)
    assert arrays.qo_indptr.tolist() == [0, 3, 4]
    assert arrays.kv_indptr.tolist() == [0, 2, 5]
    assert arrays.kv_indices.tolist() == [7, 4, 1, 9, 3]
    assert arrays.last_page_len.tolist() == [1, 1]


# ---- our use of the arguments, end to end


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("kinds", KINDS)
def test_the_arguments_mean_what_torch_step_does(stand_in, kinds, block_size):
    ours, theirs = (Walk(Shape(14, 2, 8, block_size), KINDS[kinds]) for _ in range(2))
    answers = theirs.run(FlashInferStep)
    assert theirs.error(answers) < 1e-5
    for mine, other in zip(ours.run(TorchStep), answers, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_queries_wider_than_the_pool_are_rounded_to_it(stand_in):
    walk = Walk(Shape(), KINDS["plain"])
    walk.pool = walk.pool.to(torch.float16)
    assert walk.error(walk.run(FlashInferStep)) < 0.02


def test_one_plan_for_all_layers_of_a_kind(stand_in):
    kinds = [LayerKind(window=5), LayerKind(), LayerKind(window=5), LayerKind()]
    walk = Walk(Shape(), kinds)
    for steps in (1, 2):
        parts = [(0, 10 * steps - 10, 10 * steps)]
        step = FlashInferStep(walk.pool, walk.slices(parts))
        for layer in range(len(kinds)):
            walk.attend(step, parts, layer)
        assert stand_in.plans == 2 * steps


def test_a_step_does_not_run_on_the_plan_of_another(stand_in):
    walk = Walk(Shape(), [LayerKind(), LayerKind()])
    parts = ([(0, 0, 9)], [(2, 0, 16)])
    steps = [FlashInferStep(walk.pool, walk.slices(part)) for part in parts]
    for layer in (0, 1):
        for step, part in zip(steps, parts, strict=True):
            index, _, end = part[0]
            rows = walk.attend(step, part, layer).double()
            assert torch.allclose(rows, walk.expected(layer)[index][:end], atol=1e-5)


# ---- the choice


def pool_of(dtype: torch.dtype = torch.float16, head_dim: int = 64) -> torch.Tensor:
    return torch.zeros(2, 1, 2, 4, 2, head_dim, dtype=dtype)


def test_flashinfer_is_used_where_it_runs(stand_in, caplog):
    caplog.set_level(logging.INFO)
    assert cuda_attention.usable(pool_of())
    assert cuda_attention.usable(pool_of())
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu: FlashInfer"]


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (pool_of(torch.float32), "takes float16 and bfloat16, not float32"),
        (pool_of(head_dim=80), "takes heads of 64, 128, 256 values, not 80"),
    ],
)
def test_what_flashinfer_does_not_take_goes_to_torch(stand_in, caplog, pool, reason):
    assert not cuda_attention.usable(pool)
    assert not cuda_attention.usable(pool)
    (record,) = caplog.records
    assert record.getMessage().endswith(reason)
    assert "plain torch" in record.getMessage()


def test_without_flashinfer_torch_serves(fresh, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert not cuda_attention.usable(pool_of())
    assert not cuda_attention.usable(pool_of())
    (record,) = caplog.records
    assert "plain torch" in record.getMessage()
    assert "ModuleNotFoundError" in record.getMessage()


def test_a_flashinfer_that_does_not_run_leaves_no_workspace(stand_in, monkeypatch, caplog):
    def plan(self, *args, **kwargs):
        raise RuntimeError("no compiler\nand pages of its output")

    monkeypatch.setattr(stand_in, "plan", plan)
    assert not cuda_attention.usable(pool_of())
    assert caplog.records[0].getMessage().endswith("RuntimeError: no compiler")
    assert not cuda_attention._kernels


def test_a_flashinfer_that_computes_nonsense_is_not_used(stand_in, monkeypatch, caplog):
    monkeypatch.setattr(stand_in, "run", lambda self, q, cache: q * 2)
    assert not cuda_attention.usable(pool_of())
    assert "wrong values" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("device", "usable", "chosen"),
    [
        ("cuda:0", True, "FlashInferStep"),
        ("cuda:0", False, "TorchStep"),
        ("mps:0", True, "TorchStep"),
    ],
)
def test_the_device_chooses(monkeypatch, device, usable, chosen):
    for name in ("FlashInferStep", "TorchStep"):
        monkeypatch.setattr(attention, name, lambda *args, name=name: name)
    monkeypatch.setattr(cuda_attention, "usable", lambda pool: usable)
    pool = SimpleNamespace(
        kv=SimpleNamespace(device=torch.device(device)), layout=SimpleNamespace(dtype="float32")
    )
    assert attention.paged_step(pool, []) == chosen
