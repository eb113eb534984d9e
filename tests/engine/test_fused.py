"""Which models run fused, that fused and generic compute what transformers does, and that a fused
model stays usable through steps of every size, cancelled ones and neighbours."""

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from kernel_cases import spoil
from llama_shapes import make_random, rope
from tiny_models import FAMILIES, make_tiny

from kvrelay.config import KvDtype, Quantize
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.kv.pool import KVPool

# Of the spread of the logits: the worst one in fp32, their deviation in int8. Random weights are
# the hardest to quantize; a trained model is around 0.03.
ERROR_MAX = 1e-4
ERROR_MAX_INT8 = 0.12
ERROR_MAX_INT8_KV = 0.05  # int8 KV beside fp32 weights: 0.03 at most in random models
BLOCK_SIZE = 4
TOKENS = 60
MODES: tuple[Quantize, ...] = ("none", "int8")

# name: config class, what makes it special
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "sizes that fill no group": (
        "LlamaConfig",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    ),
    "heads of 16": ("LlamaConfig", {"head_dim": 16}),
    "heads of 96": ("LlamaConfig", {"head_dim": 96}),
    "heads of 128": ("LlamaConfig", {"head_dim": 128, "hidden_size": 160}),
    "a group of seven": (
        "LlamaConfig",
        {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 32},
    ),
    "as many KV heads": ("LlamaConfig", {"num_key_value_heads": 4}),
    "one layer": ("LlamaConfig", {"num_hidden_layers": 1}),
    "llama3 rope": (
        "LlamaConfig",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "linear rope": ("LlamaConfig", rope("linear", factor=4.0)),
    "yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "norms of q and k": ("Qwen3Config", {"head_dim": 32}),
    "biases of q, k and v": ("Qwen2Config", {}),
    "window in some layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "window in all layers": ("MistralConfig", {"sliding_window": 8}),
}

GENERIC: dict[str, tuple[str, dict[str, Any]]] = {
    "another activation": ("LlamaConfig", {"hidden_act": "gelu"}),
    "a bias of the output": ("LlamaConfig", {"attention_bias": True}),
    "biases in the MLP": ("LlamaConfig", {"mlp_bias": True}),
    "an MLP that fills no vector": ("LlamaConfig", {"intermediate_size": 170}),
    "heads of 80, whose halves fill no vector": ("LlamaConfig", {"head_dim": 80}),
    "heads of 24": ("LlamaConfig", {"head_dim": 24}),
    "rope that depends on the length": ("LlamaConfig", rope("dynamic", factor=4.0)),
    "norms after attention and MLP": ("Olmo2Config", {}),
    "a scaled residual": ("GraniteConfig", {"residual_multiplier": 0.5}),
    "no rope in some layers": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "half of a head turns": (
        "StableLmConfig",
        rope("default", partial_rotary_factor=0.5),
    ),
}
NOT_IN_INT8_KV = {"heads of 24"}  # its kernels take multiples of 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model by its name in FUSED, GENERIC or FAMILIES."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("model")
            known = {**FUSED, **GENERIC}
            made[name] = make_random(*known[name], path) if name in known else make_tiny(name, path)
        return made[name]

    return get


def prompt(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(5, 250), k=count)


def load(
    path: Path,
    quantize: Quantize = "none",
    threads: int = 1,
    blocks: int = 96,
    kv_dtype: KvDtype = "auto",
) -> Any:
    # A cache of its own: what other code packed earlier would prove nothing about today's.
    cache = path.with_name(path.name + "-cache")
    runner = ModelRunner.load(
        path,
        block_size=BLOCK_SIZE,
        quantize=quantize,
        kv_dtype=kv_dtype,
        threads=threads,
        cache_dir=cache,
    )
    pool = KVPool(runner.layout, blocks)
    spoil(pool)
    runner.attach(pool)
    return runner


def in_chunks(runner: ModelRunner, tokens: list[int], cuts: tuple[int, ...]) -> torch.Tensor:
    """`[tokens, vocab]`, over blocks that are out of order."""
    blocks = list(reversed(range(-(-len(tokens) // BLOCK_SIZE))))
    parts = zip((0, *cuts), (*cuts, len(tokens)), strict=True)
    return torch.cat([runner.logits([Slice(tokens[a:b], a, blocks)]).clone() for a, b in parts])


@torch.inference_mode()
def transformers_own(path: Path, tokens: list[int]) -> torch.Tensor:
    return reference.load(path)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def check(path: Path, way: str, quantize: Quantize, kv_dtype: KvDtype = "auto") -> None:
    runner, tokens = load(path, quantize, kv_dtype=kv_dtype), prompt(TOKENS)
    assert runner.description.startswith(way)
    own = transformers_own(path, tokens)
    off = in_chunks(runner, tokens, (31, 32, 33, 50)) - own
    if quantize == "none" and kv_dtype != "int8":
        assert off.abs().max() < ERROR_MAX * own.std()
    else:
        most = ERROR_MAX_INT8 if quantize == "int8" else ERROR_MAX_INT8_KV
        assert off.std() < most * own.std()
        assert off.std() > ERROR_MAX * own.std(), "int8 cannot be that exact"
    runner.close()


# ---- right


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("name", FUSED)
def test_the_llama_shape_runs_fused_and_is_transformers_own(folder, name, quantize):
    check(folder(name), "fused", quantize)


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("name", GENERIC)
def test_what_differs_from_the_shape_runs_generic_and_is_transformers_own(folder, name, quantize):
    check(folder(name), "generic", quantize)


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tiny_architecture(folder, name, quantize):
    way = "fused" if name in ("llama", "qwen2", "mistral") else "generic"
    check(folder(name), way, quantize)


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("name", [*FUSED, *sorted(GENERIC.keys() - NOT_IN_INT8_KV), *FAMILIES])
def test_int8_kv_stays_near_transformers_own(folder, name, quantize):
    check(folder(name), "", quantize, "int8")


@pytest.mark.parametrize("quantize", MODES)
def test_a_scale_that_only_shows_far_into_a_text_is_not_lost(quantize, tmp_path):
    """Ministral's queries grow with their position, beyond the length it was first trained on."""
    settings = rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.5
    )
    path = make_random("Ministral3Config", {**settings, "head_dim": 32}, tmp_path)
    check(path, "", quantize)


@pytest.mark.parametrize("name", ["plain", "norms of q and k"])
def test_long_contexts(folder, name):
    runner, tokens = load(folder(name), blocks=320), prompt(1200)
    own = transformers_own(folder(name), tokens)
    for cuts in ((), (255, 256, 1030)):
        assert (in_chunks(runner, tokens, cuts) - own).abs().max() < ERROR_MAX * own.std()


# ---- buffers and threads


@pytest.mark.parametrize("quantize", MODES)
def test_a_small_step_then_a_large_one_then_a_small_one(folder, quantize):
    path = folder("sizes that fill no group")
    sizes = (1, 5, 2, 90, 3, 300, 1, 64)
    runner = load(path, quantize)
    kept = [in_chunks(runner, prompt(size, size), ()) for size in sizes]
    for size, logits in zip(sizes, kept, strict=True):
        fresh = load(path, quantize)
        assert torch.equal(in_chunks(fresh, prompt(size, size), ()), logits), size


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("name", ["plain", "sizes that fill no group", "window in some layers"])
def test_threads_change_no_bit(folder, name, quantize):
    tokens, answers = prompt(150), []
    for threads in (1, 2, 3):
        runner = load(folder(name), quantize, threads)
        answers.append(in_chunks(runner, tokens, (100, 101, 102, 130)))
        runner.close()
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_two_models_in_one_process_do_not_disturb_each_other(folder):
    names, seen = ("plain", "norms of q and k"), {}

    def run(name: str) -> None:
        runner = load(folder(name), "int8", threads=2)
        seen[name] = [in_chunks(runner, prompt(70), (20, 21)) for _ in range(15)]
        runner.close()

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    expected = {name: in_chunks(load(folder(name), "int8"), prompt(70), ()) for name in names}
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert all(torch.equal(logits, expected[name]) for logits in seen[name])


def test_a_closed_model_leaves_no_thread(folder):
    before = threading.active_count()
    runner = load(folder("plain"), threads=3)
    assert threading.active_count() == before + 2
    runner.close()
    assert threading.active_count() == before


# ---- steps


def test_only_wanted_slices_get_logits(folder):
    runner = load(folder("plain"))
    slices = [Slice(prompt(5, n), 0, [2 * n, 2 * n + 1]) for n in range(3)]
    everything = runner.step(slices, [True] * 3).clone()
    assert torch.equal(runner.step(slices, [False, True, False]), everything[1:2])
    assert runner.step(slices, [False] * 3).shape == (0, 257)
    assert torch.equal(runner.step(slices, [True] * 3), everything)


def test_a_slice_that_is_not_wanted_still_writes_its_kv(folder):
    runner, tokens = load(folder("plain")), prompt(10)
    whole = in_chunks(runner, tokens, ())
    runner.attach(KVPool(runner.layout, 8))
    blocks = [4, 1, 7]
    runner.step([Slice(tokens[:6], 0, blocks)], [False])
    last = runner.step([Slice(tokens[6:], 6, blocks)], [True])
    assert torch.equal(last[0], whole[-1])


def test_logits_of_a_step_outlive_a_growing_buffer(folder):
    runner = load(folder("plain"))
    first = runner.logits([Slice(prompt(2), 0, [0])])
    kept = first.clone()
    runner.logits([Slice(prompt(300), 0, list(range(75)))])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cancelled_step_ends_and_the_next_one_is_right(folder, threads):
    runner, tokens = load(folder("plain"), threads=threads), prompt(40)
    expected = in_chunks(runner, tokens, ())
    cancelled = CancelFlag()
    cancelled.set()
    for _ in range(3):
        with pytest.raises(StepCancelledError):
            runner.step([Slice(tokens, 0, list(range(10)))], [True], cancelled)
        assert torch.equal(in_chunks(runner, tokens, ()), expected)
    runner.close()


def test_a_step_cancelled_at_any_moment_leaves_the_model_usable(folder):
    runner, tokens = load(folder("plain"), threads=2, blocks=600), prompt(2000)
    expected = in_chunks(runner, tokens[:40], ())
    ended = 0
    for delay_ms in range(12):
        cancelled = CancelFlag()
        timer = threading.Timer(delay_ms / 1000, cancelled.set)
        timer.start()
        try:
            runner.step([Slice(tokens, 0, list(range(500)))], [True], cancelled)
        except StepCancelledError:
            ended += 1
        timer.join()
        assert torch.equal(in_chunks(runner, tokens[:40], ()), expected)
    assert ended, "no step was ended while it ran"
    runner.close()


def test_weight_bytes_are_those_of_the_packed_layers(folder):
    fp32, int8 = (load(folder("plain"), quantize).weight_bytes for quantize in MODES)
    # Of two layers and the head, outputs in whole panels of 32.
    layer = (128 * 64) + 64 * 64 + 2 * 192 * 64 + 64 * 176
    assert fp32 == 4 * (2 * layer + 288 * 64)
    in_groups = (128 * 64) + 64 * 64 + 2 * 192 * 64 + 64 * 192
    assert int8 == (2 * in_groups + 288 * 64) * (1 + 4 / 64)


def test_no_slot_but_its_own_is_written(folder):
    runner = load(folder("plain"))
    pool = KVPool(runner.layout, 6)
    pool.kv.fill_(7.0)
    runner.attach(pool)
    runner.step([Slice(prompt(6), 0, [4, 1]), Slice([9], 0, [3])], [True, True])
    untouched = pool.kv[[0, 2, 5]]
    assert (untouched == 7.0).all()
    assert (pool.kv[1][:, :, 2:] == 7.0).all()
    assert (pool.kv[3][:, :, 1:] == 7.0).all()
    assert not (np.isclose(pool.kv[[4]].numpy(), 7.0)).any()


def test_a_linear_layer_with_a_forward_of_its_own_is_left_as_it_is(tmp_path):
    """PhiMoE's router is an nn.Linear that answers with weights and experts."""
    path = make_random("PhimoeConfig", {"num_local_experts": 4}, tmp_path)
    check(path, "generic", "none")
