"""Transformers' attention interface, and the choice of who attends over the block pool.

transformers calls `_attention` in every layer of a model loaded with `attn_implementation=NAME`.
It goes to the step that is active in this thread: one of `paged_step` over the pool, or at load
time a LayerProbe that only notes what the model would store.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from kvrelay.engine import cuda_attention, kernel_attention
from kvrelay.engine.cuda_attention import FlashInferStep
from kvrelay.engine.kernel_attention import KernelStep
from kvrelay.engine.kernels.threads import Team
from kvrelay.engine.step import CancelFlag, Slice, UnsupportedModelError
from kvrelay.engine.torch_attention import TorchStep, attend_dense, visible
from kvrelay.kv.layout import INT8
from kvrelay.kv.pool import KVPool

NAME = "kvrelay"


class Step(Protocol):
    """Shapes, T tokens of all sequences side by side: q `[T, q_heads, head_dim]`, k and v
    `[T, kv_heads, head_dim]`; the answer has the shape of q."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


class PagedStep(Step, Protocol):
    """A Step over the pool for the tokens of `slices`, at `positions` `[T]`."""

    slices: Sequence[Slice]
    positions: torch.Tensor


active_step: ContextVar[Step] = ContextVar("active_step")


def paged_step(
    pool: KVPool,
    slices: Sequence[Slice],
    cancelled: CancelFlag | None = None,
    team: Team | None = None,
) -> PagedStep:
    """A step over `pool`, by the fastest way that its device and its layout have.

    team: the threads that the CPU's kernels share their work among; without one, plain torch. A set
    `cancelled` ends the step between two layers.

    Raises:
        UnsupportedModelError: nothing here reads such a pool; one line.
    """
    if team is not None and kernel_attention.usable(pool):
        return KernelStep(pool, team, slices, cancelled)
    if pool.layout.dtype == INT8:
        raise UnsupportedModelError(
            "KV in int8 is for a CPU and heads of a multiple of 16 values, "
            f"not for heads of {pool.layout.head_dim} on {pool.kv.device.type}"
        )
    if pool.kv.device.type == "cuda" and cuda_attention.usable(pool.kv):
        return FlashInferStep(pool.kv, slices, cancelled)
    return TorchStep(pool.kv, slices, cancelled)


@torch.inference_mode()
def run_paged(model: Any, step: PagedStep, rows: Sequence[int]) -> torch.Tensor:
    """Runs `step` through a transformers model that has our attention.

    Returns the logits `[len(rows), vocab]`, float32, of those rows of the step's tokens.
    """
    tokens = [token for s in step.slices for token in s.tokens]
    device = step.positions.device
    reset = active_step.set(step)
    try:
        output = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=step.positions.unsqueeze(0),
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            use_cache=False,
        )
    finally:
        active_step.reset(reset)
    return output.logits[0].float()


@dataclass(frozen=True)
class LayerRule:
    """How one layer attends."""

    scale: float
    window: int | None
    softcap: float | None


class LayerProbe:
    """Notes what each layer would store, and attends as if there were no cache."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer: kv_heads, k_dim, v_dim
        self.rules: dict[int, LayerRule] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        self.shapes[layer] = (k.shape[1], k.shape[2], v.shape[2])
        self.rules[layer] = LayerRule(scale, window, softcap)
        at = torch.arange(q.shape[0], device=q.device)
        return attend_dense(q, k, v, visible(at, q.shape[0], window), scale, softcap)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, q_heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = int(module.layer_idx)
    out = active_step.get().attend(layer, q, k, v, scale, sliding_window, softcap)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
