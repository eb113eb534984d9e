"""A stand-in for the part of FlashInfer that we call: same signatures, attention by plain torch.

It reads the cache through the index arrays it is given and nothing else, so it proves our index
arithmetic and our use of the arguments. It proves nothing about FlashInfer: tests/gpu does.
"""

from types import ModuleType
from typing import Any

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    """Parameters in FlashInfer's names and order; tests/gpu compares them with the real ones."""

    plans = 0

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        assert backend == "fa2"

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self._indptr = qo_indptr, paged_kv_indptr
        self._indices, self._last = paged_kv_indices, paged_kv_last_page_len
        for array in (*self._indptr, self._indices, self._last):
            assert array.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr) == len(self._last) + 1
        assert ((self._last >= 1) & (self._last <= page_size)).all()
        self._heads = num_qo_heads, num_kv_heads, head_dim_qk
        self._page_size = page_size
        self._causal, self._window_left = causal, window_left
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self._cap = logits_soft_cap or 0.0
        self._dtypes = q_data_type, kv_data_type or q_data_type
        type(self).plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        keys, values = paged_kv_cache
        q_heads, kv_heads, head_dim = self._heads
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == q.stride(-1) == 1
        assert (q.dtype, keys.dtype) == self._dtypes
        assert q.shape == (int(self._indptr[0][-1]), q_heads, head_dim)
        assert keys.shape[1:] == values.shape[1:] == (self._page_size, kv_heads, head_dim)
        out = torch.zeros_like(q)
        for request in range(len(self._last)):
            rows, pages = (slice(*p[request : request + 2].tolist()) for p in self._indptr)
            kv_len = (pages.stop - pages.start - 1) * self._page_size + int(self._last[request])
            k, v = (x[self._indices[pages]].flatten(0, 1)[:kv_len] for x in (keys, values))
            out[rows] = self._one(q[rows], k, v)
        return out

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q.float(), k) * self._scale
        if self._cap > 0:
            scores = self._cap * torch.tanh(scores / self._cap)
        at = torch.arange(len(q)).view(-1, 1) + len(k) - len(q)
        keys = torch.arange(len(k))
        hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
        if self._causal:
            hidden |= keys > at
        if self._window_left >= 0:
            hidden |= keys < at - self._window_left
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)


def module() -> Any:
    """What `import flashinfer` gives when this is in its place."""
    made: Any = ModuleType("flashinfer")
    made.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    BatchPrefillWithPagedKVCacheWrapper.plans = 0
    return made
