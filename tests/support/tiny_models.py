"""Owns the models that tests run: tiny, random, with a tokenizer, made on the fly and the same
for the same seed. Tests of the engine, the roles and the whole cluster call `make_tiny`.

The weights are drawn here and not by transformers: biases and norms are not left at 0 and 1, so
an engine that forgets one is caught, and logits are spread wide enough (standard deviation about 3)
that a greedy choice does not hang on rounding.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL_TOKENS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
BOS_ID, EOS_ID = 0, 1
SLIDING_WINDOW_TOKENS = 24
HIDDEN = 64

# Ġ is the byte-level spelling of a space.
MERGES = "Ġ t,h e,i n,e r,Ġ a,Ġt he,o n,r e,a t,Ġ s,in g,o u,Ġ w,e n,o r,Ġa n,Ġan d,l l,i s,Ġ o"

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{%- if message.role not in ['user', 'assistant', 'system'] %}
{{- raise_exception('only user, assistant and system roles') }}
{%- endif %}
{{- '<|' + message.role + '|>' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _partial_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": factor}


# Each family is here for what it does unlike the others.
_FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2, "max_position_embeddings": 4096}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": (
        Gemma2Config,
        {
            "num_hidden_layers": 4,  # sliding and full attention in turn, twice
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": SLIDING_WINDOW_TOKENS,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        {"use_parallel_residual": True, "rope_parameters": _partial_rope(0.25)},
    ),
    "phi": (PhiConfig, {"rope_parameters": _partial_rope(0.5)}),
    "mistral": (
        MistralConfig,
        {"num_key_value_heads": 2, "sliding_window": SLIDING_WINDOW_TOKENS},
    ),
}

FAMILIES = tuple(_FAMILIES)


def make_tiny(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random fp32 model of `family` (one of FAMILIES) with its tokenizer into `folder`;
    changes: of its config."""
    tokenizer = _tokenizer()
    config_class, special = _FAMILIES[family]
    config = config_class(**{**_COMMON, "vocab_size": len(tokenizer), **special, **changes})
    _save(AutoModelForCausalLM.from_config, config, folder, seed)
    tokenizer.save_pretrained(folder)
    return folder


def make_endless(folder: Path, **changes: Any) -> Path:
    """A tiny model without an end token: an answer has all the tokens it was asked for."""
    make_tiny("llama", folder, **changes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    return folder


def make_slow(folder: Path, **changes: Any) -> Path:
    """An endless one whose steps take some 10 ms, as those of small models that are of use. With
    steps that take next to nothing, gaps between tokens would be those of the tests' own Python."""
    shapes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    return make_endless(folder, **shapes, **changes)


def make_not_decoder_only(folder: Path) -> Path:
    """Writes a tiny BERT, complete with tokenizer: a model that kvrelay must refuse."""
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), **{**_COMMON, "pad_token_id": 0, "num_hidden_layers": 1}
    )
    _save(BertForMaskedLM, config, folder, seed=0)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: special tokens, the 256 bytes, a few merges. It adds no token by itself."""
    merges = [tuple(pair.split(" ")) for pair in MERGES.split(",")]
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += ["".join(pair) for pair in merges]
    bpe = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _save(
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    seed: int,
) -> None:
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):  # the caller's own draws stay as they were
        model = make(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            _draw(name, parameter, generator)
    model.save_pretrained(folder)


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Draws one parameter. [out, in] for a weight matrix, [n] for a norm or a bias."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        parameter.add_(noise * 0.2)  # about the value that leaves it without effect
    elif "embed" in name or "lm_head" in name:
        parameter.copy_(noise * 0.35)
    else:
        parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[1]))
