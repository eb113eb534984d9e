"""Random sequences that go through paged attention in rounds, and the answer by plain loops."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvrelay.engine.step import Slice

POOL_BLOCKS = 160
LENGTHS = (37, 1, 16, 29)


@dataclass(frozen=True)
class LayerKind:
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.3


@dataclass(frozen=True)
class Shape:
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: LayerKind
) -> torch.Tensor:
    """One whole sequence, `[L, heads, head_dim]` each: head by head, query by query, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        for at in range(q.shape[0]):
            first = 0 if kind.window is None else max(0, at - kind.window + 1)
            scores = keys[first : at + 1] @ q[at, head].double() * kind.scale
            if kind.softcap is not None:
                scores = torch.tanh(scores / kind.softcap) * kind.softcap
            out[at, head] = scores.softmax(0) @ values[first : at + 1]
    return out


class Walk:
    """Sequences of LENGTHS through layers of the given kinds, over a pool of somebody's litter.

    Their blocks are out of order and all over the pool. Everything is `dtype` on `device`.
    """

    def __init__(
        self,
        shape: Shape,
        kinds: Sequence[LayerKind],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        litter: float = float("nan"),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.kinds = shape, kinds
        self._rng = random.Random(seed)
        self.pool = torch.full(
            (POOL_BLOCKS, len(kinds), 2, shape.block_size, shape.kv_heads, shape.head_dim),
            litter,
            dtype=dtype,
            device=device,
        )
        free = self._rng.sample(range(POOL_BLOCKS), POOL_BLOCKS)
        self.blocks = [[free.pop() for _ in range(-(-n // shape.block_size))] for n in LENGTHS]

        def rows(length: int, heads: int) -> torch.Tensor:
            size = (len(kinds), length, heads, shape.head_dim)
            return torch.randn(size, generator=generator).to(device, dtype)

        self.q = [rows(n, shape.q_heads) for n in LENGTHS]
        self.k = [rows(n, shape.kv_heads) for n in LENGTHS]
        self.v = [rows(n, shape.kv_heads) for n in LENGTHS]

    def expected(self, layer: int) -> list[torch.Tensor]:
        """`[L, q_heads, head_dim]` of each sequence, float64."""
        return [
            naive_attention(q[layer], k[layer], v[layer], self.kinds[layer])
            for q, k, v in zip(self.q, self.k, self.v, strict=True)
        ]

    def rounds(self, decode_share: float = 0.5) -> list[list[tuple[int, int, int]]]:
        """(sequence, start, end) of each step, up to the end of all: chunks, single tokens, both.

        A share of the steps takes only single tokens, so that they go as decode steps.
        """
        done = [0] * len(LENGTHS)
        steps = []
        while any(at < n for at, n in zip(done, LENGTHS, strict=True)):
            decoding = self._rng.random() < decode_share
            step = []
            for index in self._rng.sample(range(len(LENGTHS)), len(LENGTHS)):
                size = 1 if decoding else self._rng.choice((0, 1, 5, 11))
                start, end = done[index], min(done[index] + size, LENGTHS[index])
                if end > start:
                    step.append((index, start, end))
                    done[index] = end
            if step:
                steps.append(step)
        return steps

    def slices(self, parts: list[tuple[int, int, int]]) -> list[Slice]:
        return [Slice([0] * (end - start), start, self.blocks[i]) for i, start, end in parts]

    def attend(self, step: Any, parts: list[tuple[int, int, int]], layer: int) -> torch.Tensor:
        q, k, v = (
            torch.cat([rows[i][layer, start:end] for i, start, end in parts])
            for rows in (self.q, self.k, self.v)
        )
        kind = self.kinds[layer]
        # As transformers gives them: heads first in memory.
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        out = step.attend(layer, q, k, v, kind.scale, kind.window, kind.softcap)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        return out

    def run(self, make_step: Callable[..., Any], decode_share: float = 0.5) -> list[torch.Tensor]:
        """Everything through steps; the answers `[layers, L, q_heads, head_dim]` a sequence."""
        out = [torch.empty_like(q) for q in self.q]
        for parts in self.rounds(decode_share):
            step = make_step(self.pool, self.slices(parts))
            for layer in range(len(self.kinds)):
                rows = self.attend(step, parts, layer)
                for index, start, end in parts:
                    out[index][layer, start:end] = rows[: end - start]
                    rows = rows[end - start :]
        return out

    def error(self, answers: list[torch.Tensor]) -> float:
        """How far the worst value is from the naive answer."""
        return max(
            (answer[layer].double().cpu() - own.cpu()).abs().max().item()
            for layer in range(len(self.kinds))
            for answer, own in zip(answers, self.expected(layer), strict=True)
        )
