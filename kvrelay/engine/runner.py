"""Loads a model and runs steps of it over a KV pool. Both workers own one runner each.

The model is transformers' own; only attention is ours. So whether an architecture works here is
not a list of names but a check at load time: the model's answer through the pool, in two chunks,
must be the answer it gives by itself.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvrelay.engine import attention
from kvrelay.engine.attention import LayerProbe, PagedStep, Slice
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import TORCH_DTYPES, KVPool

log = logging.getLogger(__name__)

_PROBE_TOKENS = 7  # over two blocks of the probe's block size, and odd
_PROBE_BLOCK_SIZE = 4


class UnsupportedModelError(Exception):
    """The architecture does not work over a paged KV pool; the message says why."""


class ModelRunner:
    """A model without a pool yet: `layout` says what a pool must look like; then `attach` it."""

    def __init__(self, model: Any, layout: KVLayout) -> None:
        self._model = model
        self.layout = layout
        self._pool: torch.Tensor | None = None

    @classmethod
    def load(cls, path: Path, *, dtype: str, device: str, block_size: int) -> "ModelRunner":
        """Reads the safetensors in `path`.

        Raises:
            UnsupportedModelError: the model cannot be served; says why in one line.
        """
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation="eager",  # for the probe alone; every architecture has it
            use_safetensors=True,
            local_files_only=True,
        )
        model.to(device).eval().requires_grad_(False)
        layout = _probe_layout(model, fingerprint(path), dtype, block_size)
        return cls(model, layout)

    def attach(self, pool: KVPool) -> None:
        assert pool.layout == self.layout, pool.layout.differences(self.layout)
        self._pool = pool.kv

    def step(
        self,
        slices: Sequence[Slice],
        wanted: Sequence[bool],
        cancelled: threading.Event | None = None,
    ) -> torch.Tensor:
        """Runs all slices through the model, writing their KV into the pool.

        Returns the logits `[number wanted, vocab]`, float32, of the last token of each slice that
        is wanted.

        Raises:
            StepCancelledError: `cancelled` was set meanwhile; within a layer's time.
        """
        assert self._pool is not None, "attach a pool first"
        step = PagedStep(self._pool, slices, cancelled or threading.Event())
        return _run(self._model, step, slices, wanted)


@torch.inference_mode()
def _run(
    model: Any, step: PagedStep, slices: Sequence[Slice], wanted: Sequence[bool]
) -> torch.Tensor:
    tokens: list[int] = []
    rows: list[int] = []
    for s, want in zip(slices, wanted, strict=True):
        tokens.extend(s.tokens)
        if want:
            rows.append(len(tokens) - 1)
    device = step.positions.device
    reset = attention.active_step.set(step)
    try:
        output = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=step.positions.unsqueeze(0),
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            use_cache=False,
        )
    finally:
        attention.active_step.reset(reset)
    return output.logits[0].float()


@torch.inference_mode()
def _probe_layout(model: Any, model_fingerprint: str, dtype: str, block_size: int) -> KVLayout:
    """Learns the KV shape from a run of the model, and proves that the pool gives the same."""
    tokens = list(range(1, 1 + _PROBE_TOKENS))
    expected = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    probe = LayerProbe()
    model.set_attn_implementation(attention.NAME)
    reset = attention.active_step.set(probe)
    try:
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{_name(model)}: {error}") from error
    finally:
        attention.active_step.reset(reset)
    kv_heads, head_dim = _uniform_shape(model, probe)
    shape = {"layers": len(probe.shapes), "kv_heads": kv_heads, "head_dim": head_dim}
    scratch = KVLayout(model_fingerprint, dtype, block_size=_PROBE_BLOCK_SIZE, **shape)
    pool = KVPool(scratch, scratch.blocks_for(_PROBE_TOKENS), device=model.device.type)
    blocks = list(reversed(range(pool.blocks)))
    cut = _PROBE_TOKENS // 2
    chunks = [Slice(tokens[:cut], 0, blocks), Slice(tokens[cut:], cut, blocks)]
    for chunk in chunks:
        logits = _run(model, PagedStep(pool.kv, [chunk]), [chunk], [True])
    error_max = (logits[0] - expected.logits[0, -1].float()).abs().max().item()
    spread = expected.logits[0, -1].float().std().item()
    # Rounding is around 1e-6 of the spread in fp32; a missing mask or position is around 1.
    if not error_max <= (1e-3 if dtype == "float32" else 0.2) * max(spread, 1e-6):
        raise UnsupportedModelError(
            f"{_name(model)}: over a paged KV pool its logits are off by {error_max:.2g}"
        )
    return KVLayout(model_fingerprint, dtype, block_size=block_size, **shape)


def _uniform_shape(model: Any, probe: LayerProbe) -> tuple[int, int]:
    if not probe.shapes:
        raise UnsupportedModelError(f"{_name(model)}: it does not use the attention interface")
    if sorted(probe.shapes) != list(range(len(probe.shapes))):
        raise UnsupportedModelError(f"{_name(model)}: only some layers have attention")
    shapes = set(probe.shapes.values())
    kv_heads, k_dim, v_dim = min(shapes)
    if len(shapes) > 1 or k_dim != v_dim:
        raise UnsupportedModelError(f"{_name(model)}: layers differ in KV shape: {sorted(shapes)}")
    return kv_heads, k_dim


def _name(model: Any) -> str:
    return type(model).__name__
