"""Whether a model works over a paged KV pool, found out by running it.

Called by generic.py at every load and by packing.py when it packs weights.

There is no list of architectures. A model is refused when its configuration asks for attention that
ours does not do, or when its logits through the pool, chunk by chunk, are not its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvrelay.engine import attention
from kvrelay.engine.attention import LayerProbe
from kvrelay.engine.step import Slice, UnsupportedModelError
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool

_TOKENS = 7  # over two blocks of the probe's size, and odd
_BLOCK_SIZE = 4
# As a part of the logits' spread. Rounding is around 1e-6 in fp32, and up to 0.12 in bf16 (between
# transformers' own eager and sdpa attention, too); a missing mask or position is around 1.
# int8 is around 0.03.
ERROR_MAX_INT8 = 0.25
ERROR_MAX = {"float32": 1e-3, "bfloat16": 0.4, "float16": 0.4, "int8": ERROR_MAX_INT8}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Masks that transformers builds from the configuration alone, out of an attention function's sight.
_MASK_SETTINGS = ("attention_chunk_size", "keep_window_size")


def context_limit(config: Any) -> int | None:
    """Positions up to which a token's KV depends on its own position alone; None: any.

    Beyond it, dynamic and longrope scaling turn by the longest sequence seen, so that KV already
    stored would be wrong and one request would change another.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in (rope, *per_layer_type):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            trained = parameters.get("original_max_position_embeddings")
            return trained or config.max_position_embeddings
    return None


@dataclass(frozen=True)
class Watched:
    """What one run of a model with its own attention showed."""

    name: str
    probe: LayerProbe
    tokens: tuple[int, ...]
    logits: torch.Tensor  # [tokens, vocab] float32
    device: str

    def layout(self, model_fingerprint: str, dtype: str, block_size: int) -> KVLayout:
        kv_heads, head_dim, _ = self.probe.shapes[0]
        return KVLayout(
            model_fingerprint,
            dtype,
            layers=len(self.probe.shapes),
            block_size=block_size,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )


@torch.inference_mode()
def watch(model: Any) -> Watched:
    """Runs a model loaded with its own attention; leaves it with ours.

    Raises:
        UnsupportedModelError: it cannot be served.
    """
    _check_config(model)
    # From all over the vocabulary: its first tokens are often special ones, which no model was
    # trained to read in a row, and which it answers with numbers that any rounding upsets.
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens = tuple(vocab * n // (_TOKENS + 1) for n in range(1, 1 + _TOKENS))
    inputs = torch.tensor([tokens], device=model.device)
    expected = model(input_ids=inputs, use_cache=False).logits[0].float()
    probe = LayerProbe()
    model.set_attn_implementation(attention.NAME)
    reset = attention.active_step.set(probe)
    try:
        model(input_ids=inputs, use_cache=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{_name(model)}: {error}") from error
    finally:
        attention.active_step.reset(reset)
    _check_shapes(model, probe)
    return Watched(_name(model), probe, tokens, expected, model.device.type)


def check_logits(
    watched: Watched,
    layout: KVLayout,
    run: Callable[[KVPool, Slice], torch.Tensor],
    error_max: float,
) -> None:
    """Compares `run`, which gives the logits `[vocab]` of a slice's last token, with the model.

    layout: of the pool that `run` gets; its block size is not used.

    Raises:
        UnsupportedModelError: they differ by more than `error_max` of the logits' spread.
    """
    scratch = replace(layout, block_size=_BLOCK_SIZE)
    pool = KVPool(scratch, scratch.blocks_for(_TOKENS), device=watched.device)
    blocks = list(reversed(range(pool.blocks)))
    cut = _TOKENS // 2
    for chunk in (
        Slice(watched.tokens[:cut], 0, blocks),
        Slice(watched.tokens[cut:-1], cut, blocks),
        Slice(watched.tokens[-1:], _TOKENS - 1, blocks),
    ):
        own = watched.logits[chunk.end - 1]
        error = ((run(pool, chunk) - own).std() / own.std().clamp(min=1e-6)).item()
        if not error <= error_max:
            raise UnsupportedModelError(
                f"{watched.name}: over a paged KV pool its logits are {error:.2g} of a spread off"
            )


def _check_config(model: Any) -> None:
    config = model.config.get_text_config()
    asked = [name for name in _MASK_SETTINGS if getattr(config, name, None)]
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if asked or unknown:
        what = ", ".join([*asked, *sorted(unknown)])
        raise UnsupportedModelError(f"{_name(model)}: attention with {what}")


def _check_shapes(model: Any, probe: LayerProbe) -> None:
    if not probe.shapes:
        raise UnsupportedModelError(f"{_name(model)}: it does not use the attention interface")
    if sorted(probe.shapes) != list(range(len(probe.shapes))):
        raise UnsupportedModelError(f"{_name(model)}: only some layers have attention")
    shapes = set(probe.shapes.values())
    if len(shapes) > 1:
        raise UnsupportedModelError(f"{_name(model)}: layers differ in KV shape: {sorted(shapes)}")
    _, k_dim, v_dim = min(shapes)
    if k_dim != v_dim:
        raise UnsupportedModelError(f"{_name(model)}: keys of {k_dim}, values of {v_dim} a head")


def _name(model: Any) -> str:
    return type(model).__name__
