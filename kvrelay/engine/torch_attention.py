"""Attention in plain torch: over the block pool on any device, and with no cache at all.

The pool's side gathers each sequence's blocks and calls torch's own attention. It is what
`paged_step` (attention.py) falls back to, and what the faster ways are compared with in tests.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kvrelay.engine.pool_step import PoolStep
from kvrelay.engine.step import CancelFlag, Slice


class TorchStep(PoolStep):
    """Decode steps go in groups of similar length, other steps slice by slice."""

    def __init__(
        self,
        pool: torch.Tensor,
        slices: Sequence[Slice],
        cancelled: CancelFlag | None = None,
    ) -> None:
        super().__init__(pool, slices, cancelled)
        self._masks: dict[int | None, list[torch.Tensor]] = {}
        self._groups = self._by_length() if all(len(s.tokens) == 1 for s in slices) else []
        if self._groups:
            self._tables = [self._padded_table(rows) for rows in self._groups]
        else:
            self._tables = [self._padded_table([row]) for row in range(len(slices))]

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
        keys, values = self.pool[:, layer, 0], self.pool[:, layer, 1]
        masks = self._masks_for(window)
        out = torch.empty_like(q)
        if self._groups:
            for group, table, mask in zip(self._groups, self._tables, masks, strict=True):
                out[group] = _decode(q[group], keys[table], values[table], mask, scale, softcap)
            return out
        row = 0
        for s, table, mask in zip(self.slices, self._tables, masks, strict=True):
            rows = slice(row, row + len(s.tokens))
            row = rows.stop
            if s.start == 0:  # the whole context is at hand: no need to read it back
                context_k, context_v = k[rows], v[rows]
            else:
                context_k = keys[table[0]].flatten(0, 1)[: s.end]
                context_v = values[table[0]].flatten(0, 1)[: s.end]
            out[rows] = attend_dense(q[rows], context_k, context_v, mask, scale, softcap)
        return out

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
        return -(-s.end // self.block_size)

    def _masks_for(self, window: int | None) -> list[torch.Tensor]:
        """True where a query may look: `[B, 1, 1, S]` a decode group, `[T, S]` a slice."""
        if window not in self._masks:
            if self._groups:
                self._masks[window] = [
                    visible(self.positions[group], table.shape[1] * self.block_size, window)[
                        :, None, None
                    ]
                    for group, table in zip(self._groups, self._tables, strict=True)
                ]
            else:
                rows = self.positions.split([len(s.tokens) for s in self.slices])
                self._masks[window] = [
                    visible(at, s.end, window) for at, s in zip(rows, self.slices, strict=True)
                ]
        return self._masks[window]


def visible(at: torch.Tensor, context: int, window: int | None) -> torch.Tensor:
    """`[T, context]`: which positions a query at each of `at` `[T]` may look at."""
    keys = torch.arange(context, device=at.device)
    at = at.view(-1, 1)
    mask = keys <= at
    return mask if window is None else mask & (keys > at - window)


def attend_dense(
    q: torch.Tensor,  # [T, q_heads, head_dim]
    k: torch.Tensor,  # [S, kv_heads, head_dim]
    v: torch.Tensor,
    mask: torch.Tensor,  # [T, S]
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with keys and values in one piece: like q."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return _sdpa(q, k, v, mask, scale, softcap)[0].transpose(0, 1)


def _decode(
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
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))  # [B, kv_heads, S, head_dim]
    return _sdpa(grouped, k, v, mask, scale, softcap).reshape(batch, q_heads, head_dim)


def _sdpa(
    q: torch.Tensor,  # [..., T, head_dim]
    k: torch.Tensor,  # [..., S, head_dim]
    v: torch.Tensor,
    mask: torch.Tensor,  # [..., T, S]
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v
