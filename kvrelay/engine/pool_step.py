"""What torch's and FlashInfer's way to attend over the block pool share: where a step's tokens go,
and when it stops. `paged_step` (attention.py) chooses between them and the CPU's kernels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError

_HALF_MAX = torch.finfo(torch.float16).max


class PoolStep(ABC):
    """One step over a pool. Everything that all layers need is worked out once, when it is made.

    pool: `[blocks, layers, 2, block_size, kv_heads, head_dim]`.
    positions: `[T]`, of the tokens of all slices side by side.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        slices: Sequence[Slice],
        cancelled: CancelFlag | None = None,
    ) -> None:
        self.pool = pool
        self.slices = slices
        self.block_size = pool.shape[3]
        self._cancelled = cancelled or CancelFlag()
        positions: list[int] = []
        blocks: list[int] = []
        for s in slices:
            positions.extend(range(s.start, s.end))
            blocks.extend(s.blocks[at // self.block_size] for at in range(s.start, s.end))
        self.positions = torch.tensor(positions, device=pool.device)
        self._write_block = torch.tensor(blocks, device=pool.device)
        self._write_slot = self.positions % self.block_size
        self._clear_tails()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,  # [T, q_heads, head_dim]
        k: torch.Tensor,  # [T, kv_heads, head_dim]
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Stores k and v, then attends to them and to what earlier steps stored: like q.

        Raises:
            StepCancelledError: nobody wants this step any more.
        """
        if self._cancelled.is_set():
            raise StepCancelledError
        # In the pool's type from here on: whether a token is read back from the pool or is still
        # at hand must not change what is seen of it.
        k, v = self._narrowed(k), self._narrowed(v)
        at = (self._write_block, self._write_slot)
        self.pool[:, layer, 0].index_put_(at, k)
        self.pool[:, layer, 1].index_put_(at, v)
        return self._look(layer, q, k, v, scale, window, softcap)

    def _narrowed(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool.dtype is torch.float16:
            # What is too large becomes the largest: infinity would spoil whoever gives it weight 0.
            x = x.clamp(-_HALF_MAX, _HALF_MAX)
        return x.to(self.pool.dtype)

    @abstractmethod
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
        """Attends over the pool, which has k and v of this step already. Shapes as in `attend`."""

    def _clear_tails(self) -> None:
        """Zeroes a block that this step enters and does not fill.

        Masked slots are read all the same, with weight 0; a NaN that an earlier user left there
        would come through.
        """
        size = self.block_size
        tails = [
            s.blocks[s.end // size]
            for s in self.slices
            if s.end % size and s.end - s.end % size >= s.start
        ]
        if tails:
            self.pool.index_fill_(0, torch.tensor(tails, device=self.pool.device), 0)
