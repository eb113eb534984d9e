"""Random models of any architecture, every parameter of them drawn: no bias is 0, no norm is 1."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


def make_random(config_class: str, settings: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """Writes a model of COMMON with `settings` into `folder`."""
    config = getattr(transformers, config_class)(**{**COMMON, **settings})
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(noise * 0.35)
            else:
                parameter.copy_(noise * 1.2 / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(folder)
    return folder
