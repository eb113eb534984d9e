"""Attention over the block pool, plugged into transformers' attention interface.

transformers calls `_attention` in every layer of a model loaded with `attn_implementation=NAME`.
It goes to the step that is active in this thread: a PagedStep over the pool, or at load time a
LayerProbe that only notes what the model would store. ModelRunner sets the active step.
"""

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kvrelay.engine.step import Slice, StepCancelledError

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


active_step: ContextVar[Step] = ContextVar("active_step")


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


@dataclass
class PagedStep:
    """One step over the pool. What every layer needs is computed once, here."""

    pool: torch.Tensor  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    slices: Sequence[Slice]
    cancelled: threading.Event = field(default_factory=threading.Event)
    _masks: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._block_size = self.pool.shape[3]
        device = self.pool.device
        positions, blocks = [], []
        for s in self.slices:
            for position in range(s.start, s.end):
                positions.append(position)
                blocks.append(s.blocks[position // self._block_size])
        self.positions = torch.tensor(positions, device=device)  # [T]
        self._write_block = torch.tensor(blocks, device=device)
        self._write_slot = self.positions % self._block_size
        self._clear_tails()
        self._decode = all(len(s.tokens) == 1 for s in self.slices)
        if self._decode:
            self._groups = self._by_length()
            self._tables = [self._padded_table(rows) for rows in self._groups]
        else:
            self._tables = [self._table(s) for s in self.slices]

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
        if self.cancelled.is_set():
            raise StepCancelledError
        keys, values = self.pool[:, layer, 0], self.pool[:, layer, 1]
        keys[self._write_block, self._write_slot] = k.to(keys.dtype)
        values[self._write_block, self._write_slot] = v.to(values.dtype)
        masks = self._masks_for(window)
        out = torch.empty_like(q)
        if self._decode:
            for group, table, mask in zip(self._groups, self._tables, masks, strict=True):
                k_v = keys[table], values[table]
                out[group] = self._attend_decode(q[group], *k_v, mask, scale, softcap)
            return out
        row = 0
        for s, table, mask in zip(self.slices, self._tables, masks, strict=True):
            rows = slice(row, row + len(s.tokens))
            row = rows.stop
            if s.start == 0:  # the whole context is at hand: no need to read it back
                context_k, context_v = k[rows], v[rows]
            else:
                context_k = keys[table].flatten(0, 1)[: s.end]
                context_v = values[table].flatten(0, 1)[: s.end]
            out[rows] = _attend(q[rows], context_k, context_v, mask, scale, softcap)
        return out

    def _attend_decode(
        self,
        q: torch.Tensor,  # [B, q_heads, head_dim]
        k: torch.Tensor,  # [B, blocks, block_size, kv_heads, head_dim]
        v: torch.Tensor,
        mask: torch.Tensor,  # [B, 1, 1, S]
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        batch, q_heads, head_dim = q.shape
        kv_heads = k.shape[3]
        # The query heads of one KV head stand in for query positions: no KV head is repeated.
        grouped = q.view(batch, kv_heads, q_heads // kv_heads, head_dim)
        k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))  # [B, kv_heads, S, head_dim]
        out = _sdpa(grouped, k, v, mask, scale, softcap)
        return out.reshape(batch, q_heads, head_dim)

    def _table(self, s: Slice) -> torch.Tensor:
        return torch.tensor(list(s.blocks[: self._blocks_used(s)]), device=self.pool.device)

    def _clear_tails(self) -> None:
        """Zeroes a block that this step enters and does not fill.

        Masked slots are read all the same, with weight 0; a NaN that an earlier user left there
        would come through.
        """
        for s in self.slices:
            if s.end % self._block_size and s.end - s.end % self._block_size >= s.start:
                self.pool[s.blocks[s.end // self._block_size]].zero_()

    def _by_length(self) -> list[list[int]]:
        """Rows whose sequences are within a factor of two: a long one must not make the short
        ones beside it as expensive as itself."""
        groups: dict[int, list[int]] = {}
        for row, s in enumerate(self.slices):
            groups.setdefault(self._blocks_used(s).bit_length(), []).append(row)
        return list(groups.values())

    def _padded_table(self, rows: list[int]) -> torch.Tensor:
        """`[B, M]`: these sequences' blocks, the shorter ones filled up with their last."""
        used = [self._blocks_used(self.slices[row]) for row in rows]
        table = []
        for row, count in zip(rows, used, strict=True):
            blocks = self.slices[row].blocks
            table.append([*blocks[:count], *[blocks[count - 1]] * (max(used) - count)])
        return torch.tensor(table, device=self.pool.device)

    def _blocks_used(self, s: Slice) -> int:
        return -(-s.end // self._block_size)

    def _masks_for(self, window: int | None) -> list[torch.Tensor]:
        """True where a query may look: `[B, 1, 1, S]` a decode group, `[T, S]` a slice."""
        if window not in self._masks:
            device = self.pool.device
            if self._decode:
                self._masks[window] = [
                    _visible(
                        self.positions[group].view(-1, 1),
                        torch.arange(table.shape[1] * self._block_size, device=device),
                        window,
                    )[:, None, None]
                    for group, table in zip(self._groups, self._tables, strict=True)
                ]
            else:
                self._masks[window] = [
                    _visible(
                        torch.arange(s.start, s.end, device=device).view(-1, 1),
                        torch.arange(s.end, device=device),
                        window,
                    )
                    for s in self.slices
                ]
        return self._masks[window]


@torch.inference_mode()
def run_paged(model: Any, step: PagedStep, wanted: Sequence[bool]) -> torch.Tensor:
    """Runs `step` through a transformers model that has our attention.

    Returns the logits `[number wanted, vocab]`, float32, of the last token of each slice wanted.
    """
    tokens: list[int] = []
    rows: list[int] = []
    for s, want in zip(step.slices, wanted, strict=True):
        tokens.extend(s.tokens)
        if want:
            rows.append(len(tokens) - 1)
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


class LayerProbe:
    """Notes what each layer would store, and attends as if there were no cache."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer: kv_heads, k_dim, v_dim

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
        at = torch.arange(q.shape[0], device=q.device)
        return _attend(q, k, v, _visible(at.view(-1, 1), at, window), scale, softcap)


def _visible(at: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    mask = keys <= at
    return mask if window is None else mask & (keys > at - window)


def _attend(
    q: torch.Tensor,  # [T, q_heads, head_dim]
    k: torch.Tensor,  # [S, kv_heads, head_dim]
    v: torch.Tensor,
    mask: torch.Tensor,  # [T, S]
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return _sdpa(q, k, v, mask, scale, softcap)[0].transpose(0, 1)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale
        )
    scores = torch.tanh(q @ k.to(q.dtype).transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v.to(q.dtype)
