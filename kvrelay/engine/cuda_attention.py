"""Attention over the block pool by FlashInfer's kernels, on a CUDA device.

`paged_step` (attention.py) asks `usable` first. One kind of wrapper serves every batch: to
FlashInfer a decode row is a prefill of one token, and its decode wrapper, told to use tensor cores,
runs the same kernel. The back end is always fa2, so the kernels that the probe of a model compiles
at load time are the ones that serve; nothing is compiled between two tokens.

FlashInfer is imported when a pool on a CUDA device first asks for it: it is an optional extra.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from kvrelay.engine.pool_step import PoolStep
from kvrelay.engine.step import CancelFlag, Slice

log = logging.getLogger(__name__)

# What fa2 takes in every FlashInfer from 0.6 on.
_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)
# Partial sums where a long context is split over several thread blocks. FlashInfer names 128 MiB;
# 16 query heads a KV head, of 256 values, on 132 multiprocessors come to 264 MiB.
_WORKSPACE_BYTES = 384 << 20


@dataclass(frozen=True, eq=False)
class PageArrays:
    """What FlashInfer wants to know of a step, one entry a slice; int32, in host memory.

    qo_indptr: `[slices + 1]`, row of q at which each slice begins.
    kv_indptr: `[slices + 1]`, place in kv_indices at which its blocks begin.
    kv_indices: `[blocks used]`, the blocks of each sequence, first position first.
    last_page_len: `[slices]`, slots used in the last of them, 1 to block_size.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor


def page_arrays(slices: Sequence[Slice], block_size: int) -> PageArrays:
    """The arrays for these slices, whose own tokens are already in the pool."""
    tables = [s.blocks[: -(-s.end // block_size)] for s in slices]
    arrays = (
        list(accumulate((len(s.tokens) for s in slices), initial=0)),
        list(accumulate((len(table) for table in tables), initial=0)),
        [block for table in tables for block in table],
        [(s.end - 1) % block_size + 1 for s in slices],
    )
    return PageArrays(*(torch.tensor(array, dtype=torch.int32) for array in arrays))


class FlashInferStep(PoolStep):
    """Reads the pool in place: a layer's keys and values are views of it, equal in their strides,
    which is what the kernels ask of a cache that is not in one piece."""

    def __init__(
        self,
        pool: torch.Tensor,
        slices: Sequence[Slice],
        cancelled: CancelFlag | None = None,
    ) -> None:
        super().__init__(pool, slices, cancelled)
        self._pages = page_arrays(slices, self.block_size)

    def _look(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        kind = _LayerKind(q.shape[1], scale, window, softcap)
        wrapper = _device_kernels(self.pool.device).planned(kind, self._pages, self.pool)
        keys, values = self.pool[:, layer, 0], self.pool[:, layer, 1]
        out: torch.Tensor = wrapper.run(q.to(self.pool.dtype).contiguous(), (keys, values))
        return out.to(q.dtype)


@dataclass(frozen=True)
class _LayerKind:
    """Layers that may share a plan. A model has one or two kinds."""

    q_heads: int
    scale: float
    window: int | None
    softcap: float | None


class _DeviceKernels:
    """FlashInfer on one device: its workspace, and a wrapper for each kind of layer.

    For one thread, as an engine has. Steps may be interleaved: whose plan a wrapper holds is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._flashinfer = importlib.import_module("flashinfer")
        self._device = device
        # Zeroes, because some of FlashInfer's back ends count in it.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[_LayerKind, Any] = {}
        self._planned_for: dict[_LayerKind, PageArrays] = {}

    def planned(self, kind: _LayerKind, pages: PageArrays, pool: torch.Tensor) -> Any:
        """A wrapper ready to run layers of this kind; plans once a step."""
        if kind not in self._wrappers:
            self._wrappers[kind] = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend="fa2"
            )
        wrapper = self._wrappers[kind]
        if self._planned_for.get(kind) is not pages:
            self._planned_for.pop(kind, None)  # a plan that fails half-way is nobody's
            self._wait()
            _plan(wrapper, kind, pages, pool)
            self._planned_for[kind] = pages
        return wrapper

    def _wait(self) -> None:
        """Until the device has read the plan before: a plan is made in place, in pinned memory."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _plan(wrapper: Any, kind: _LayerKind, pages: PageArrays, pool: torch.Tensor) -> None:
    block_size, kv_heads, head_dim = pool.shape[3:]
    wrapper.plan(
        pages.qo_indptr,
        pages.kv_indptr,
        pages.kv_indices,
        pages.last_page_len,
        kind.q_heads,
        kv_heads,
        head_dim,
        block_size,
        causal=True,  # the last query of a slice is at the last position of its context
        sm_scale=kind.scale,
        # Theirs counts the positions to the left of the query, ours counts the query's own, too.
        window_left=-1 if kind.window is None else kind.window - 1,
        logits_soft_cap=kind.softcap,
        q_data_type=pool.dtype,
        kv_data_type=pool.dtype,
    )


_kernels: dict[torch.device, _DeviceKernels] = {}
_verdicts: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def _device_kernels(device: torch.device) -> _DeviceKernels:
    if device not in _kernels:
        _kernels[device] = _DeviceKernels(device)
    return _kernels[device]


def usable(pool: torch.Tensor) -> bool:
    """Whether FlashInferStep can serve this pool. Found out and logged once for pools alike."""
    about = (pool.device, pool.dtype, pool.shape[-1])
    if about not in _verdicts:
        reason = _unsupported(pool.dtype, pool.shape[-1]) or _failure(pool)
        if reason is None:
            log.info("attention on %s: FlashInfer", pool.device)
        else:
            log.warning("attention on %s: plain torch, which is slow: %s", pool.device, reason)
        _verdicts[about] = reason is None
    return _verdicts[about]


def _unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in _DTYPES:
        return f"FlashInfer takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in _HEAD_DIMS:
        return f"FlashInfer takes heads of {', '.join(map(str, _HEAD_DIMS))} values, not {head_dim}"
    return None


def _failure(pool: torch.Tensor) -> str | None:
    """What goes wrong when one token attends to itself; None: nothing.

    It may be anything: no FlashInfer, no compiler for its kernels, a driver or a device too old.
    """
    scratch = torch.zeros_like(pool[:1])
    row = torch.ones_like(scratch[0, 0, 0, :1])  # [1, kv_heads, head_dim]
    step = FlashInferStep(scratch, [Slice([0], 0, [0])])
    try:
        out = step.attend(0, row, row, row, 1.0, None, None)
    except Exception as error:
        _kernels.pop(pool.device, None)  # its workspace is large
        return f"FlashInfer does not run here: {type(error).__name__}: {error}".partition("\n")[0]
    return None if torch.allclose(out, row) else "FlashInfer gives wrong values here"
