"""Attention over a pool in host memory through the compiled kernels, for transformers' modules.

`paged_step` (attention.py) chooses it on a CPU. What the fused step does in its own phases is done
here layer by layer, with the same kernels: the same bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from kvrelay.engine.kernels import paged
from kvrelay.engine.kernels.pool import write_row
from kvrelay.engine.kernels.threads import (
    GUEST_ROWS_MIN,
    Team,
    aligned,
    begin_step,
    end_step,
    next_phase,
)
from kvrelay.engine.kernels.vector import LANES
from kvrelay.engine.plan import StepPlan, make_works, pool_record
from kvrelay.engine.shapes import LINE_BYTES
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.kv.pool import KVPool

_PHASES = 3


def usable(pool: KVPool) -> bool:
    return pool.kv.device.type == "cpu" and pool.layout.head_dim % LANES == 0


@njit(nogil=True, cache=True)
def _store(pools, slices, tables, row_slice, layer, k, v, stride):  # type: ignore[no-untyped-def]
    for row in range(len(row_slice)):
        s = slices[row_slice[row]]
        position = s.start + row - s.row
        at = row * stride
        write_row(pools[0], tables, s.table, layer, position, k + at, v + at)


@njit(nogil=True, cache=True)
def _attend(  # type: ignore[no-untyped-def]
    thread, number, seats, counters, pools, rules, slices, tables, layer, q, q_stride, out,
    partials, works, prompts, decodes,
):  # fmt: skip
    pool, rule, work, seat = pools[0], rules[0], works[thread], seats[thread]
    if not begin_step(thread, seat, number):
        return
    next_phase(thread, seat, counters)
    if prompts:
        paged.attend(
            counters, seat, pool, rule, slices, tables, layer, q, q_stride, out, q_stride, work
        )
    if decodes:
        counters += LINE_BYTES
        paged.attend_split(
            counters, seat, pool, rule, slices, tables, layer, q, q_stride, partials, work
        )
        counters += LINE_BYTES
        next_phase(thread, seat, counters)
        paged.attend_join(counters, seat, pool, rule, slices, partials, out, q_stride, work)
    next_phase(thread, seat, counters + LINE_BYTES)
    end_step(thread, seat)


class KernelStep:
    """Any dtype of q, k and v; the arithmetic is float32, or int8 over an int8 pool."""

    def __init__(
        self, pool: KVPool, team: Team, slices: Sequence[Slice], cancelled: CancelFlag | None = None
    ) -> None:
        self.slices = slices
        self.positions = torch.tensor([at for s in slices for at in range(s.start, s.end)])
        self._cancelled = cancelled or CancelFlag()
        self._team = team
        self._layout = pool.layout
        self._pools = pool_record(pool)
        self._plan = StepPlan(slices, pool.layout.block_size)
        self._works: np.ndarray | None = None

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
        plan = self._plan
        keys, values = (side.to(torch.float32).contiguous() for side in (k, v))
        _store(
            self._pools, plan.slices, plan.tables, plan.row_slice, layer,
            keys.data_ptr(), values.data_ptr(), k.shape[1] * k.shape[2] * 4,
        )  # fmt: skip
        return self._look(layer, q, scale, window, softcap)

    def _look(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        plan, heads = self._plan, q.shape[1]
        group = heads // self._layout.kv_heads
        if self._works is None:
            self._make_buffers(heads, group)
        numbers = np.array([scale, softcap or 0.0], np.float32) * np.float32(paged.LOG2_E)
        at = numbers.ctypes.data
        rules = np.array([(group, window or 0, at, at + 4 if softcap else 0)], paged.RULE)
        queries = q.to(torch.float32).contiguous()
        out = torch.empty_like(queries)
        self._counters.fill(0)
        arguments = (
            self._team.seats, self._counters.ctypes.data, self._pools, rules, plan.slices,
            plan.tables, layer, queries.data_ptr(), heads * q.shape[2] * 4, out.data_ptr(),
            self._partials.ctypes.data, self._works, plan.prompts, plan.decodes,
        )  # fmt: skip
        with_guests = len(plan.tokens) >= GUEST_ROWS_MIN
        self._team.run(
            lambda thread, number: _attend(thread, number, *arguments), with_guests=with_guests
        )
        return out.to(q.dtype)

    def _make_buffers(self, heads: int, group: int) -> None:
        head_pad = int(self._pools["head_pad"][0])
        self._counters = aligned((_PHASES + 1) * LINE_BYTES, np.uint8)
        self._partials = aligned(self._plan.segments * heads * (LANES + head_pad), np.float32)
        sizes = paged.work_floats(head_pad, group)
        self._works, self._buffers = make_works(sizes, self._team.size)
