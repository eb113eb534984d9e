"""A step and a pool as the kernels read them, in records. Used by fused and kernel_attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvrelay.engine.kernels import paged
from kvrelay.engine.kernels.pool import DTYPES, POOL
from kvrelay.engine.kernels.softmax import SEGMENT
from kvrelay.engine.kernels.threads import aligned
from kvrelay.engine.kernels.vector import LANES
from kvrelay.engine.shapes import GROUP, PANEL, up_to
from kvrelay.engine.step import Slice
from kvrelay.kv.layout import INT8
from kvrelay.kv.pool import KVPool


def pool_record(pool: KVPool) -> np.ndarray:
    """What the attention kernels take of a pool in host memory: `[1]` POOL."""
    layout = pool.layout
    # In int8 the positions of a head lie side by side, else the heads of a position.
    int8 = layout.dtype == INT8
    row_bytes = layout.head_bytes * (1 if int8 else layout.kv_heads)
    record = np.zeros(1, POOL)
    fields = {
        "address": pool.bytes.ctypes.data,
        "block_bytes": layout.block_bytes,
        "side_bytes": layout.side_bytes,
        "row_bytes": row_bytes,
        "head_bytes": layout.head_bytes * (layout.block_size if int8 else 1),
        "scales_at": layout.vectors_bytes,
        "block_size": layout.block_size,
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "head_pad": up_to(layout.head_dim, GROUP if int8 else PANEL),
        "dtype": DTYPES[layout.dtype],
    }
    for name, value in fields.items():
        record[name] = value
    return record


class StepPlan:
    """A step's slices as the kernels read them."""

    def __init__(self, slices: Sequence[Slice], block_size: int) -> None:
        self.slices = np.zeros(len(slices), paged.SLICE)
        tokens: list[int] = []
        tables: list[int] = []
        self.segments = self.longest = 0
        self.prompts = self.decodes = False
        owner: list[int] = []
        for number, s in enumerate(slices):
            self.slices[number] = (len(tokens), s.start, len(s.tokens), len(tables), self.segments)
            tables.extend(s.blocks[: -(-s.end // block_size)])
            owner.extend([number] * len(s.tokens))
            tokens.extend(s.tokens)
            self.longest = max(self.longest, s.end)
            if len(s.tokens) == 1:
                self.decodes = True
                self.segments += s.start // SEGMENT + 1
            else:
                self.prompts = True
        self.tokens = np.array(tokens, np.int64)
        self.tables = np.array(tables, np.int64)
        self.row_slice = np.array(owner, np.int64)


def make_works(sizes: Mapping[str, int], threads: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """`[threads]` WORK records, and the arrays behind them."""
    works = np.zeros(threads, paged.WORK)
    arrays: list[Any] = []
    for thread in range(threads):
        for name, count in sizes.items():
            arrays.append(aligned(count + LANES, np.float32))
            works[thread][name] = arrays[-1].ctypes.data
    return works, arrays
