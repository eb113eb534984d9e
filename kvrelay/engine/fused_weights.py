"""Finds the Llama shape in a transformers model and packs its weights for fused.py.

Called by packing.py. There is no list of architectures: a model fits when its layers have the
modules of the shape and no parameter besides; that it computes the same is proved afterwards.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvrelay.engine.attention import LayerProbe
from kvrelay.engine.packed import pack
from kvrelay.engine.shapes import GROUP, FusedShape, up_to

# Rope whose angles depend on nothing but the position, and what may be said of it: a parameter that
# is not known here may do something that only shows far into a text, where no proof looks.
_ROPES = {"default", "linear", "llama3", "yarn"}
_ROPE_PARAMETERS = {
    "rope_type", "rope_theta", "factor", "attention_factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor",
}  # fmt: skip
_MATRICES = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
}  # fmt: skip
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
_BIASES = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
_VECTOR = 16


def find_shape(model: Any, probe: LayerProbe, int8: bool) -> FusedShape | None:
    """The shape of a transformers model that `probe` has watched; None when it is another one."""
    config = model.config.get_text_config()
    body: Any = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    rope = getattr(config, "rope_parameters", None) or {}
    rotary, epsilon = getattr(body, "rotary_emb", None), getattr(config, "rms_norm_eps", None)
    if layers is None or rotary is None or epsilon is None:
        return None
    if rope.get("rope_type") not in _ROPES or set(rope) - _ROPE_PARAMETERS:
        return None
    names = [{name for name, _ in layer.named_parameters()} for layer in layers]
    if any(found != names[0] for found in names) or not _fits(names[0]):
        return None
    outside = {name for name, _ in model.named_parameters() if ".layers." not in name}
    if outside - {"lm_head.weight"} != {"model.embed_tokens.weight", "model.norm.weight"}:
        return None
    rules = [probe.rules[n] for n in range(len(layers))]
    scales, softcaps = {rule.scale for rule in rules}, {rule.softcap for rule in rules}
    kv_heads, head_dim, _ = probe.shapes[0]
    shape = FusedShape(
        layers=len(layers),
        hidden=config.hidden_size,
        q_heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=layers[0].mlp.gate_proj.weight.shape[0],
        vocab=model.lm_head.weight.shape[0],
        epsilon=epsilon,
        scale=rules[0].scale,
        rope_scale=float(getattr(rotary, "attention_scaling", 1.0)),
        windows=tuple(rule.window or 0 for rule in rules),
        qkv_bias="self_attn.q_proj.bias" in names[0],
        qk_norm="self_attn.q_norm.weight" in names[0],
        int8=int8,
    )
    angles = len(rotary.inv_freq)
    whole_vectors = all(n % _VECTOR == 0 for n in (shape.hidden, shape.inner, head_dim))
    whole_rope = angles * 2 == head_dim and (angles % _VECTOR == 0 or angles == _VECTOR // 2)
    activation = getattr(config, "hidden_act", None)
    if len(scales) > 1 or softcaps != {None} or activation != "silu" or not whole_vectors:
        return None
    return shape if whole_rope else None


def _fits(names: set[str]) -> bool:
    """Whether a layer's parameters are those of the shape, with or without what it may lack."""
    needed = {f"{name}.weight" for name in _MATRICES | _NORMS}
    biases = {f"{name}.bias" for name in _BIASES}
    head_norms = {f"{name}.weight" for name in _HEAD_NORMS}
    beyond = names - needed
    return needed <= names and beyond in (set(), biases, head_norms, biases | head_norms)


def packed_weights(model: Any, shape: FusedShape) -> Iterator[tuple[str, np.ndarray]]:
    """What FusedModel takes, name by name, in the order of the model."""
    wide = up_to(shape.hidden, GROUP)
    embedding = np.zeros((shape.vocab, wide), np.float32)
    embedding[:, : shape.hidden] = _array(model.model.embed_tokens.weight)[: shape.vocab]
    yield "embedding", embedding
    qkv, output, gate, up, down, head = shape.linears()
    for n, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield f"{n}.norm", _row(layer.input_layernorm.weight)
        yield f"{n}.qkv", pack(_stacked(*inputs), qkv)
        if shape.qkv_bias:
            yield f"{n}.bias", _row(torch.cat([part.bias for part in inputs]))
        if shape.qk_norm:
            yield f"{n}.q_norm", _row(attention.q_norm.weight)
            yield f"{n}.k_norm", _row(attention.k_norm.weight)
        yield f"{n}.output", pack(_stacked(attention.o_proj), output)
        yield f"{n}.mlp_norm", _row(layer.post_attention_layernorm.weight)
        yield f"{n}.gate", pack(_stacked(mlp.gate_proj), gate)
        yield f"{n}.up", pack(_stacked(mlp.up_proj), up)
        yield f"{n}.down", pack(_stacked(mlp.down_proj), down)
    yield "final_norm", _row(model.model.norm.weight)
    yield "inv_freq", _row(model.model.rotary_emb.inv_freq)
    yield "head", pack(_stacked(model.lm_head), head)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def _stacked(*modules: Any) -> np.ndarray:
    return np.concatenate([_array(module.weight) for module in modules])


def _row(tensor: torch.Tensor) -> np.ndarray:
    row = np.zeros(up_to(len(tensor), GROUP), np.float32)
    row[: len(tensor)] = _array(tensor)
    return row
