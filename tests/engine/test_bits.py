"""A token's logits are the same bits whatever the batch, the chunks, the blocks and the workers.

Promised for every model that runs fused, in int8 and in fp32. Models that run the generic way keep
it as long as torch's own functions do: of these, GELU (tanh), SiLU and sigmoid round the last
elements of what a thread gets in another way than the rest, so that it holds for layers whose
width is a multiple of 32, computed by one thread of torch; else logits differ by rounding.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batchings import FIRST_TOKEN, LAST_TOKEN, Batching, Worker
from tiny_models import FAMILIES, make_tiny

from kvrelay.config import KvDtype, Quantize
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice

FUSED = ("llama", "qwen2", "mistral")
GENERIC = tuple(name for name in FAMILIES if name not in FUSED)
BATCHINGS = 200
BATCHINGS_FEW = 15
BLOCKS = 200
BLOCK_SIZE = 4
LENGTHS = (1, 2, 5, 17, 33, 64, 65, 90)
LENGTHS_LONG = (*LENGTHS, 260, 300)  # over a segment of attention
LENGTHS_GENERIC = (*LENGTHS, 210)  # more elements of the MLP than torch's threads leave together
MODES: tuple[Quantize, ...] = ("none", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def one_thread_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workers(
    folder: Path, quantize: Quantize, *, kv_dtype: KvDtype = "auto"
) -> tuple[Worker, Worker]:
    """A prefill worker of one thread and a decode worker of two."""
    # A cache of their own: what other code packed earlier would prove nothing about today's.
    how = {"block_size": BLOCK_SIZE, "quantize": quantize, "kv_dtype": kv_dtype}
    cache = folder.with_name(folder.name + "-cache")
    runners = [
        ModelRunner.load(folder, **how, threads=threads, cache_dir=cache) for threads in (1, 2)
    ]
    prefill, decode = (Worker(runner, BLOCKS * 2) for runner in runners)
    return prefill, decode


def play(pair: tuple[Worker, Worker], batchings: int, lengths: tuple[int, ...]) -> None:
    for seed in range(batchings):
        Batching(*pair, seed, lengths).run()
    for worker in pair:
        assert len(worker.free) == worker.pool.blocks
        worker.runner.close()


@pytest.mark.parametrize(
    ("quantize", "kv_dtype"), [("none", "auto"), ("int8", "auto"), ("int8", "int8")]
)
def test_200_random_batchings_of_llama_give_the_same_bits(folder, quantize, kv_dtype):
    pair = workers(folder("llama"), quantize, kv_dtype=kv_dtype)
    assert pair[0].runner.description.startswith("fused")
    play(pair, BATCHINGS, LENGTHS_LONG)


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("family", [name for name in FUSED if name != "llama"])
def test_every_fused_family_gives_the_same_bits(folder, family, quantize):
    pair = workers(folder(family), quantize)
    assert pair[0].runner.description.startswith("fused")
    play(pair, BATCHINGS_FEW, LENGTHS_LONG)


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("quantize", MODES)
def test_narrow_kv_gives_the_same_bits(folder, kv_dtype, quantize):
    play(workers(folder("llama"), quantize, kv_dtype=kv_dtype), BATCHINGS_FEW, LENGTHS)


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("family", GENERIC)
def test_generic_families_give_the_same_bits_while_torch_has_one_thread(
    folder, family, quantize, one_thread_of_torch
):
    pair = workers(folder(family), quantize)
    assert pair[0].runner.description.startswith("generic")
    play(pair, BATCHINGS_FEW, LENGTHS_GENERIC)


@pytest.mark.parametrize("family", GENERIC)
def test_generic_families_over_int8_kv_give_the_same_bits(folder, family, one_thread_of_torch):
    play(workers(folder(family), "none", kv_dtype="int8"), BATCHINGS_FEW, LENGTHS_GENERIC)


@pytest.mark.parametrize("family", GENERIC)
def test_generic_families_in_long_chunks_differ_by_no_more_than_rounding(folder, family):
    pair = workers(folder(family), "none")
    worker, rng = pair[0], random.Random(0)
    tokens = rng.choices(range(FIRST_TOKEN, LAST_TOKEN), k=301)
    whole = worker.alone(tokens, rng)
    blocks, cut = worker.take(rng, 301), 100
    parts = (Slice(tokens[:cut], 0, blocks), Slice(tokens[cut:], cut, blocks))
    logits = torch.cat([worker.runner.logits([part]).clone() for part in parts])
    assert (logits - whole).abs().max() < 1e-5 * whole.std()
    for worker in pair:
        worker.runner.close()
