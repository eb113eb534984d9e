"""The paged pool changes no logits: ModelRunner against transformers' own forward."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import reference
import torch
import transformers
from tiny_models import FAMILIES, make_not_decoder_only, make_tiny
from transformers import AutoModelForCausalLM

from kvrelay.config import Quantize
from kvrelay.engine.runner import ModelRunner, UnsupportedModelError
from kvrelay.engine.step import Slice
from kvrelay.kv.pool import KVPool

BLOCK_SIZE = 4
POOL_BLOCKS = 96
VOCAB = 96
PROMPT_TOKENS = 60  # far over every sliding window and short context below
ERROR_MAX = 1e-4  # of the spread of the logits
# Of the spread of the logits, their deviation with KV in int8: by how the weights are.
ERROR_MAX_INT8_KV: dict[Quantize, float] = {"none": 0.03, "int8": 0.12}

# (KV heads, head dimension, layers) as tiny_models makes them
SHAPES = {
    "llama": (2, 16, 3),
    "qwen2": (2, 16, 3),
    "gemma": (1, 32, 3),
    "gemma2": (2, 32, 4),
    "gpt_neox": (4, 16, 3),
    "phi": (4, 16, 3),
    "mistral": (2, 16, 3),
}

# ---- more architectures, made from their configs

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
_DEEPSEEK_V3 = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


# name: config class, what makes it special
WORKING: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("GPT2Config", _GPT2),
    "multi-query": ("GPTBigCodeConfig", _GPT2),
    "positions with an offset": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "experts": (
        "Qwen3MoeConfig",
        {
            **_COMMON,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
        },
    ),
    "two ropes": (
        "Gemma3TextConfig",
        {
            **_COMMON,
            "sliding_window": 8,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "window in some layers": (
        "Qwen2Config",
        {**_COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "yarn": (
        "LlamaConfig",
        {**_COMMON, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state space": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "MambaForCausalLM: attention with linear_attention",
    ),
    "alibi": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "BloomForCausalLM: it does not use the attention interface",
    ),
    "alibi, too": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        "MptForCausalLM: it does not use the attention interface",
    ),
    "attention of its own": (
        "GPTJConfig",
        {**_GPT2, "rotary_dim": 4},
        "GPTJForCausalLM: it does not use the attention interface",
    ),
    "attention sinks": (
        "GptOssConfig",
        {**_COMMON, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        "GptOssForCausalLM: attention with s_aux",
    ),
    "convolution in some layers": (
        "Lfm2Config",
        {**_COMMON, "layer_types": ["conv", "full_attention"]},
        "Lfm2ForCausalLM: attention with conv",
    ),
    "chunked attention": (
        "Llama4TextConfig",
        {
            **_COMMON,
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
        },
        "Llama4ForCausalLM: attention with attention_chunk_size",
    ),
    "dynamic mask": (
        "DogeConfig",
        {**_COMMON, "keep_window_size": 8},
        "DogeForCausalLM: attention with keep_window_size",
    ),
    "state space beside attention": (
        "FalconH1Config",
        {
            **_COMMON,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        "FalconH1ForCausalLM: ",
    ),
    "keys longer than values": (
        "DeepseekV3Config",
        {**_COMMON, **_DEEPSEEK_V3},
        "DeepseekV3ForCausalLM: keys of 12, values of 8 a head",
    ),
}

# What a probe of a few tokens cannot see: these differ only far into a text.
LIMITED: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic rope": (
        "LlamaConfig",
        {**_COMMON, **_rope("dynamic", factor=4.0), "max_position_embeddings": 16},
    ),
    "longrope": (
        "Phi3Config",
        {
            **_COMMON,
            **_rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
            "original_max_position_embeddings": 16,
        },
    ),
}


def make(config_class: str, settings: dict[str, Any], folder: Path) -> Path:
    """A random model of any architecture, its weights wide enough that attention matters."""
    config = getattr(transformers, config_class)(**settings)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 1.2 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, block_size: int = BLOCK_SIZE) -> ModelRunner:
    return ModelRunner.load(folder, dtype="float32", device="cpu", block_size=block_size)


# ---- running


class Checked:
    """A runner whose every answer is compared with transformers' own forward."""

    def __init__(self, folder: Path, *, litter: float = 1e4) -> None:
        """`litter` is what other requests left in the pool: nobody may look at it."""
        self._runner = load(folder)
        self._model = reference.load(folder)
        pool = KVPool(self._runner.layout, POOL_BLOCKS)
        pool.kv.fill_(litter)
        self._runner.attach(pool)
        self._blocks = random.Random(5).sample(range(POOL_BLOCKS), POOL_BLOCKS)
        self._expected: dict[tuple[int, ...], torch.Tensor] = {}

    def take_blocks(self, tokens: int) -> list[int]:
        return [self._blocks.pop() for _ in range(-(-tokens // BLOCK_SIZE))]

    def step(self, parts: list[tuple[list[int], int, int, list[int]]]) -> None:
        """Runs prompt[start:end] of each (prompt, start, end, blocks) in one step."""
        slices = [Slice(prompt[start:end], start, blocks) for prompt, start, end, blocks in parts]
        logits = self._runner.step(slices, [True] * len(slices))
        assert logits.dtype == torch.float32
        for row, (prompt, start, end, _) in zip(logits, parts, strict=True):
            own = self._own(prompt)
            error = (row - own[end - 1]).abs().max() / own.std()
            assert error < ERROR_MAX, f"positions {start} to {end}: off by {error:.1e}"

    def run_alone(self, prompt: list[int], cuts: list[int]) -> None:
        blocks = self.take_blocks(len(prompt))
        for start, end in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
            self.step([(prompt, start, end, blocks)])

    def _own(self, prompt: list[int]) -> torch.Tensor:
        key = tuple(prompt)
        if key not in self._expected:
            with torch.inference_mode():
                output = self._model(input_ids=torch.tensor([prompt]), use_cache=False)
            self._expected[key] = output.logits[0].float()
        return self._expected[key]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def check_all_ways(checked: Checked) -> None:
    """Whole, cut anywhere, token by token, and beside others: always the same logits."""
    rng = random.Random(3)
    prompt = prompt_of(PROMPT_TOKENS)
    checked.run_alone(prompt, [])
    checked.run_alone(prompt, sorted(rng.sample(range(1, PROMPT_TOKENS), 5)))
    checked.run_alone(prompt_of(9, seed=1), list(range(1, 9)))
    check_mixed(checked, rng)


def check_mixed(checked: Checked, rng: random.Random) -> None:
    """Prompts of several lengths move on side by side: now a chunk, now one token, now nothing."""
    prompts = [prompt_of(length, seed=length) for length in (PROMPT_TOKENS, 1, 17, 33)]
    blocks = [checked.take_blocks(len(prompt)) for prompt in prompts]
    done = [0] * len(prompts)
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        decoding = rng.random() < 0.5  # a step of single tokens takes another way through the code
        parts = []
        for index in rng.sample(range(len(prompts)), len(prompts)):
            end = min(done[index] + (1 if decoding else rng.randint(0, 9)), len(prompts[index]))
            if end > done[index]:
                parts.append((prompts[index], done[index], end, blocks[index]))
                done[index] = end
        if parts:
            checked.step(parts)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


# ---- tests


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_family_are_transformers_own(family, name):
    check_all_ways(Checked(family(name)))


@pytest.mark.parametrize("quantize", ERROR_MAX_INT8_KV)
@pytest.mark.parametrize("name", ["phi", "gpt_neox"])
def test_int8_kv_costs_a_generic_model_little(
    family: Callable[[str], Path], name: str, quantize: Quantize
) -> None:
    runner = ModelRunner.load(
        family(name), block_size=BLOCK_SIZE, quantize=quantize, kv_dtype="int8"
    )
    assert runner.description.startswith("generic")
    assert runner.layout.dtype == "int8"
    runner.attach(KVPool(runner.layout, POOL_BLOCKS))
    prompt, blocks = prompt_of(PROMPT_TOKENS), random.Random(5).sample(range(POOL_BLOCKS), 15)
    with torch.inference_mode():
        own = reference.load(family(name))(input_ids=torch.tensor([prompt]), use_cache=False)
    own = own.logits[0]
    parts = []
    for start, end in ((0, 31), (31, 32), (32, PROMPT_TOKENS)):
        parts.append(runner.logits([Slice(prompt[start:end], start, blocks)]).clone())
    off = torch.cat(parts) - own
    assert ERROR_MAX * own.std() < off.std() < ERROR_MAX_INT8_KV[quantize] * own.std()
    runner.close()


@pytest.mark.parametrize("name", WORKING)
def test_logits_of_other_architectures_are_transformers_own(name, tmp_path):
    check_all_ways(Checked(make(*WORKING[name], tmp_path)))


@pytest.mark.parametrize("seed", range(8))
def test_no_way_to_batch_changes_the_logits(family, seed):
    name = random.Random(seed).choice(FAMILIES)
    check_mixed(Checked(family(name)), random.Random(seed))


@pytest.mark.parametrize("litter", [float("nan"), float("inf")])
def test_what_others_left_in_the_pool_does_not_matter(family, litter):
    check_all_ways(Checked(family("llama"), litter=litter))


def test_only_wanted_slices_get_logits(family):
    folder = family("llama")
    runner = load(folder)
    runner.attach(KVPool(runner.layout, 8))
    slices = [Slice(prompt_of(5, seed), 0, [2 * seed, 2 * seed + 1]) for seed in range(3)]
    everything = runner.step(slices, [True] * 3)
    one = runner.step(slices, [False, True, False])
    assert torch.allclose(one, everything[1:2], atol=1e-4)
    assert runner.step(slices, [False] * 3).shape == (0, everything.shape[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_is_learned_from_the_model(family, name):
    layout = load(family(name), block_size=16).layout
    assert (layout.kv_heads, layout.head_dim, layout.layers) == SHAPES[name]
    assert (layout.block_size, layout.dtype) == (16, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_types_are_served(family, name, dtype):
    runner = ModelRunner.load(family(name), dtype=dtype, device="cpu", block_size=16)
    assert runner.layout.dtype == dtype


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_in_one_line(name, tmp_path):
    config_class, settings, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError) as caught:
        load(make(config_class, settings, tmp_path))
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LIMITED)
def test_scaling_by_the_longest_sequence_limits_the_context(name, tmp_path):
    assert load(make(*LIMITED[name], tmp_path)).context_limit == 16


def test_a_model_that_is_not_decoder_only_is_refused_in_one_line(tmp_path):
    with pytest.raises(UnsupportedModelError) as caught:
        load(make_not_decoder_only(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kv_may_be_kept_in_another_dtype(
    tmp_path: Path, dtype: str, kv_dtype: Literal["float32", "float16", "bfloat16", "int8"]
) -> None:
    runner = ModelRunner.load(make_tiny("phi", tmp_path), dtype=dtype, kv_dtype=kv_dtype)
    assert runner.layout.dtype == kv_dtype
    runner.close()


@pytest.mark.parametrize(
    ("quantize", "head_dim", "kept"),
    [("none", 64, "float32"), ("int8", 64, "int8"), ("int8", 128, "int8"), ("int8", 32, "float32")],
)
def test_by_itself_kv_is_int8_where_the_rest_is_and_it_is_smaller(
    tmp_path: Path, quantize: Quantize, head_dim: int, kept: str
) -> None:
    runner = ModelRunner.load(make_tiny("llama", tmp_path, head_dim=head_dim), quantize=quantize)
    assert runner.layout.dtype == kept
    runner.close()


def test_int8_kv_is_refused_where_no_kernel_reads_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="KV in int8 is for a CPU, not for cuda"):
        ModelRunner.load(tmp_path, device="cuda", kv_dtype="int8")


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    runner = ModelRunner.load(make_tiny("llama", tmp_path))
    runner.attach(KVPool(runner.layout, 2))
    with pytest.raises(IndexError):
        runner.step([Slice([100_000], 0, [0])], [True])
    runner.step([Slice([1], 0, [0])], [True])
    runner.close()
