"""Loads a model and runs steps of it over a KV pool. Both workers own one runner each.

The model is transformers' own; only attention is ours (attention.py). Whether that works for an
architecture is found out at load time (probe.py).
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvrelay.engine.attention import PagedStep, run_paged
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.probe import UnsupportedModelError, context_limit, probe_layout
from kvrelay.engine.step import Slice
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import TORCH_DTYPES, KVPool

__all__ = ["ModelRunner", "UnsupportedModelError"]


class ModelRunner:
    """A model without a pool yet: `layout` says what a pool must look like; then `attach` it.

    context_limit: longest sequence in tokens that the model gives stable KV for; None: any.
    """

    def __init__(self, model: Any, layout: KVLayout) -> None:
        self.layout = layout
        self.context_limit = context_limit(model.config.get_text_config())
        self._model = model
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
            attn_implementation="eager",  # which every architecture has; the probe changes it
            use_safetensors=True,
            local_files_only=True,
        )
        model.to(device).eval().requires_grad_(False)
        return cls(model, probe_layout(model, fingerprint(path), dtype, block_size))

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
        return run_paged(self._model, step, wanted)
