"""Loads a model and runs steps of it over a KV pool. Both workers own one runner each.

On a CPU in float32 the weights come packed (packing.py), and a model of the Llama shape runs
fused (fused.py). Everything else runs as transformers' modules (generic.py).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kvrelay.cache import default_cache
from kvrelay.config import KvDtype, Quantize
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.fused import FusedModel
from kvrelay.engine.kernels.threads import Guest, Team
from kvrelay.engine.kernels.tiles import HAS_VNNI
from kvrelay.engine.prepared import Prepared, find
from kvrelay.engine.shapes import GROUP
from kvrelay.engine.step import CancelFlag, Slice, UnsupportedModelError
from kvrelay.kv.layout import INT8, KVLayout
from kvrelay.kv.pool import KVPool

log = logging.getLogger(__name__)

__all__ = ["ModelRunner", "UnsupportedModelError"]


class _Model(Protocol):
    @property
    def weight_bytes(self) -> int: ...

    def attach(self, pool: KVPool) -> None: ...

    def step(
        self, slices: Sequence[Slice], last_rows: Sequence[int], cancelled: CancelFlag
    ) -> np.ndarray | torch.Tensor: ...

    def close(self) -> None: ...


class ModelRunner:
    """A model without a pool yet: `layout` says what a pool must look like; then `attach` it.

    context_limit: longest sequence in tokens that the model gives stable KV for; None: any.
    description: how it runs, for people.
    """

    def __init__(
        self, model: _Model, layout: KVLayout, context_limit: int | None, description: str
    ) -> None:
        self.layout = layout
        self.context_limit = context_limit
        self.description = description
        self._model = model

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        block_size: int = 16,
        quantize: Quantize = "none",
        kv_dtype: KvDtype = "auto",
        threads: int = 1,
        guests: Sequence[Guest] = (),
        cache_dir: Path | None = None,
    ) -> "ModelRunner":
        """Maps the packed weights of the model in `path`, packing them first if need be; or reads
        its safetensors where nothing is packed.

        Raises:
            UnsupportedModelError: the model cannot be served; says why in one line.
            CacheError: packed weights cannot be written.
        """
        if "int8" in (quantize, kv_dtype) and not HAS_VNNI:
            log.warning("no AVX512-VNNI here: int8 needs less memory, but prefill is slower in it")
        kv = dtype if kv_dtype == "auto" else kv_dtype
        if quantize != "none" and (device != "cpu" or dtype != "float32"):
            raise UnsupportedModelError(
                f"{quantize} is for a CPU and float32, not for {dtype} on {device}"
            )
        if kv == INT8 and device != "cpu":
            raise UnsupportedModelError(f"KV in int8 is for a CPU, not for {device}")
        if device != "cpu" or dtype != "float32":
            return cls._load_generic(path, dtype, device, block_size, kv, threads, guests)
        cache = cache_dir or default_cache()
        prepared = find(path, quantize, cache) or cls._prepare(path, quantize, cache)
        if prepared.shape is None:
            sizes = (block_size, kv, threads, guests)
            return cls._load_generic(path, dtype, device, *sizes, prepared, quantize)
        heads_fill_lines = prepared.shape.head_dim % GROUP == 0  # others would be padded
        if kv_dtype == "auto" and quantize == "int8" and HAS_VNNI and heads_fill_lines:
            kv = INT8
        model = FusedModel(prepared.shape, prepared.weights(), Team(threads, guests))
        description = _described("fused", quantize, kv, threads)
        return cls(model, prepared.layout(kv, block_size), None, description)

    @staticmethod
    def _prepare(path: Path, quantize: Quantize, cache_dir: Path) -> Prepared:
        # Brings transformers: seconds that a start with everything prepared does not spend.
        from kvrelay.engine.packing import prepare

        return prepare(path, quantize, cache_dir)

    @classmethod
    def _load_generic(
        cls,
        path: Path,
        dtype: str,
        device: str,
        block_size: int,
        kv: str,
        threads: int,
        guests: Sequence[Guest],
        prepared: Prepared | None = None,
        quantize: Quantize = "none",
    ) -> "ModelRunner":
        """transformers' modules; with the packed weights of `prepared` where there are any."""
        from kvrelay.engine.generic import GenericModel, load_model, pack_linears
        from kvrelay.engine.probe import context_limit, watch

        int8 = quantize == "int8"
        source = load_model(path, dtype, device)
        watched = watch(source)
        model = GenericModel(source, Team(threads, guests) if device == "cpu" else Team(1))
        if prepared is not None:
            pack_linears(source, prepared.weights(), int8, model.team)
            weights = prepared.model_fingerprint
            description = _described("generic", quantize, kv, threads)
        else:
            weights = fingerprint(path)
            description = f"transformers' modules, {dtype} on {device}, KV {kv}"
        layout = watched.layout(weights, kv, block_size)
        model.check(watched, layout, int8=int8)
        limit = context_limit(source.config.get_text_config())
        return cls(model, layout, limit, description)

    @property
    def weight_bytes(self) -> int:
        """Weights as stored that every decode step reads."""
        return self._model.weight_bytes

    def attach(self, pool: KVPool) -> None:
        assert pool.layout == self.layout, pool.layout.differences(self.layout)
        self._model.attach(pool)

    def warm_up(self) -> None:
        """Loads the compiled kernels, and maps the weights' pages, before somebody waits for it.

        Writes into the first block of the pool.
        """
        self.step([Slice([0], 0, [0])], [True])
        if self.layout.block_size > 1:
            self.step([Slice([0, 0], 0, [0])], [True])

    def step(
        self,
        slices: Sequence[Slice],
        wanted: Sequence[bool],
        cancelled: CancelFlag | None = None,
    ) -> torch.Tensor:
        """Runs all slices through the model, writing their KV into the pool.

        Returns the logits `[number wanted, vocab]`, float32, of the last token of each slice that
        is wanted; valid until the next step.

        Raises:
            StepCancelledError: `cancelled` was set meanwhile; within a layer's time.
        """
        last_rows: list[int] = []
        end = 0
        for s, want in zip(slices, wanted, strict=True):
            end += len(s.tokens)
            if want:
                last_rows.append(end - 1)
        return self._run(slices, last_rows, cancelled or CancelFlag())

    def profile(self) -> dict[str, float] | None:
        """Which part of the last step each kind of phase took; None unless the model is fused."""
        return self._model.profile() if isinstance(self._model, FusedModel) else None

    def logits(self, slices: Sequence[Slice]) -> torch.Tensor:
        """As `step`, the logits `[tokens of all slices, vocab]` of every token."""
        return self._run(slices, range(sum(len(s.tokens) for s in slices)), CancelFlag())

    def _run(
        self, slices: Sequence[Slice], last_rows: Sequence[int], cancelled: CancelFlag
    ) -> torch.Tensor:
        logits = self._model.step(slices, last_rows, cancelled)
        return torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits

    def close(self) -> None:
        """Ends the helper threads."""
        self._model.close()


def _described(way: str, quantize: Quantize, kv: str, threads: int) -> str:
    kind = "fp32" if quantize == "none" else "int8 (VNNI)" if HAS_VNNI else "int8 (no VNNI here)"
    return f"{way} {kind}, KV {kv}, {threads} thread{'s' if threads > 1 else ''}"
