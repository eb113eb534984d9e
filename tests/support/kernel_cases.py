"""One sequence of any length that goes through KernelStep in parts, and the answer by plain loops.

For what attention_cases.py has not: long contexts, the pool's own type beside float32 queries, and
answers that are compared to the bit.
"""

import random
from collections.abc import Sequence

import torch
from attention_cases import LayerKind, Shape, naive_attention

from kvrelay.engine.kernel_attention import KernelStep
from kvrelay.engine.kernels.threads import Team
from kvrelay.engine.step import Slice
from kvrelay.kv.layout import INT8, KVLayout
from kvrelay.kv.pool import TORCH_DTYPES, KVPool

LAYERS = 2
LAYER = 1
_SPARE = 8  # blocks that are nobody's
NEIGHBOUR_TOKENS = 40
_INT8_LITTER = 255


def make_pool(
    shape: Shape, dtype: str, blocks: int, *, layers: int = LAYERS, litter: float = float("nan")
) -> KVPool:
    layout = KVLayout("test", dtype, layers, shape.block_size, shape.kv_heads, shape.head_dim)
    pool = KVPool(layout, blocks)
    spoil(pool, litter)
    return pool


def spoil(pool: KVPool, litter: float = float("nan")) -> None:
    """Fills it with what others left. In int8 always with bytes that are no numbers as scales."""
    pool.kv.fill_(_INT8_LITTER if pool.layout.dtype == INT8 else litter)


class LongCase:
    """A sequence of `length` tokens, and a shorter neighbour for its steps.

    q `[length, q_heads, head_dim]`; k and v have `dtype`'s values already, unless that is int8.
    """

    def __init__(
        self, shape: Shape, kind: LayerKind, length: int, dtype: str = "float32", seed: int = 0
    ) -> None:
        self.shape, self.kind, self.length, self.dtype = shape, kind, length, dtype
        self._rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn((count, heads, shape.head_dim), generator=generator)

        self._own, self._neighbour = (
            [rows(count, heads) for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads)]
            for count in (length, NEIGHBOUR_TOKENS)
        )
        for part in (self._own, self._neighbour):
            for side in (1, 2):
                if dtype != INT8:
                    part[side] = part[side].to(TORCH_DTYPES[dtype]).float()

    def expected(self) -> torch.Tensor:
        """`[length, q_heads, head_dim]` float64."""
        return naive_attention(*self._own, self.kind)

    def chunks(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(start, end) of parts whose sizes are drawn from `sizes`."""
        parts, at = [], 0
        while at < self.length:
            end = min(at + self._rng.choice(sizes), self.length)
            parts.append((at, end))
            at = end
        return parts

    def run(
        self, parts: Sequence[tuple[int, int]], team: Team, *, neighbours: bool = False
    ) -> torch.Tensor:
        """The answers `[length, q_heads, head_dim]`, over a pool of somebody's litter."""
        shape = self.shape
        needed, beside = (
            -(-self.length // shape.block_size),
            -(-NEIGHBOUR_TOKENS // shape.block_size),
        )
        pool = make_pool(shape, self.dtype, needed + beside + _SPARE)
        ids = self._rng.sample(range(pool.blocks), needed + beside)
        blocks, others = ids[:needed], ids[needed:]
        answers, passed = [], 0
        for start, end in parts:
            slices, inputs = [Slice([0] * (end - start), start, blocks)], [self._own]
            spans = [(start, end)]
            if neighbours and passed < NEIGHBOUR_TOKENS:
                until = min(passed + self._rng.choice((1, 1, 3, 9)), NEIGHBOUR_TOKENS)
                slices.append(Slice([0] * (until - passed), passed, others))
                inputs.append(self._neighbour)
                spans.append((passed, until))
                passed = until
                if self._rng.random() < 0.5:
                    slices, inputs, spans = slices[::-1], inputs[::-1], spans[::-1]
            q, k, v = (
                torch.cat([source[n][a:b] for source, (a, b) in zip(inputs, spans, strict=True)])
                for n in range(3)
            )
            step = KernelStep(pool, team, slices)
            out = step.attend(LAYER, q, k, v, self.kind.scale, self.kind.window, self.kind.softcap)
            first = inputs[0] is self._own
            answers.append(out[: end - start] if first else out[-(end - start) :])
        return torch.cat(answers)
