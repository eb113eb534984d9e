"""How a bench gets its two programs: our engine as a worker has it, and transformers' own model.

Called by the engine and the perplexity bench. Loads torch and transformers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as chatter

from cluster.bench.report import BenchError
from cluster.preparation import Progress, one_line, quiet
from kvrelay.cache import CacheError, default_cache
from kvrelay.config import KvDtype, Quantize
from kvrelay.engine.packing import prepare as pack_weights
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import UnsupportedModelError
from kvrelay.kv.layout import INT8
from kvrelay.kv.pool import KVPool

BLOCK_SIZE = 16  # the default of `kvrelay serve`
_KV_SPREAD = 0.1


@dataclass(frozen=True)
class EngineChoice:
    """What a person can choose of the engine."""

    quantize: Quantize
    kv_dtype: KvDtype
    threads: int


@contextlib.contextmanager
def loaded_runner(path: Path, choice: EngineChoice, on_progress: Progress) -> Iterator[ModelRunner]:
    """Our engine, without a pool; its weights are packed first if need be. Ends its threads
    afterwards.

    Raises:
        BenchError: the model cannot be served, or the cache cannot be written.
    """
    cache = default_cache()
    try:
        with _silent_transformers():
            pack_weights(path, choice.quantize, cache, on_progress)
            runner = ModelRunner.load(
                path,
                dtype="float32",
                device="cpu",
                block_size=BLOCK_SIZE,
                quantize=choice.quantize,
                kv_dtype=choice.kv_dtype,
                threads=choice.threads,
                cache_dir=cache,
            )
    except (UnsupportedModelError, CacheError) as error:
        raise BenchError(str(error)) from error
    try:
        yield runner
    finally:
        runner.close()


@contextlib.contextmanager
def attached_pool(runner: ModelRunner, blocks: int) -> Iterator[KVPool]:
    """A pool like a decode worker's, every page of it written: no reading of untouched memory,
    which costs nothing, is timed."""
    pool = KVPool(runner.layout, blocks, shared=True)
    try:
        pool.kv[0] = _some_kv(pool)
        pool.kv[1:] = pool.kv[0]
        runner.attach(pool)
        yield pool
    finally:
        pool.close()


def _some_kv(pool: KVPool) -> torch.Tensor:
    shape = pool.kv.shape[1:]
    if pool.layout.dtype == INT8:
        # Bytes whose every four are a small positive float32: they will do as scales, too.
        return torch.randint(0x38, 0x3E, shape, dtype=torch.uint8)
    return torch.randn(shape) * _KV_SPREAD


def load_transformers(path: Path) -> Any:
    """The model as transformers runs it when nobody has touched it, in float32: with SDPA, where
    the architecture has it."""
    with _silent_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    return model.eval().requires_grad_(False)


def outline(path: Path) -> Any:
    """The same model without its weights (they are on the meta device): its shapes, its limits.

    Raises:
        BenchError: transformers knows no such model.
    """
    try:
        with _silent_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise BenchError(one_line(error)) from error


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its progress bars, which would come between ours."""
    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        with quiet("transformers"):
            yield
    finally:
        if shown:
            chatter.enable_progress_bar()
