"""The block pool as the kernels see it: where keys and values lie, how they are read and written.

What a block looks like is decided in kvrelay/kv/layout.py.
"""

import numpy as np
from numba import njit

from kvrelay.engine.kernels.int8_head import write_key, write_value
from kvrelay.engine.kernels.vector import LANES, Code, Int, emitted

FLOAT32, FLOAT16, BFLOAT16, INT8 = 0, 1, 2, 3
DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8}

POOL = np.dtype(
    [
        ("address", np.int64),
        ("block_bytes", np.int64),
        ("side_bytes", np.int64),  # of one layer's keys in a block; its values come next
        ("row_bytes", np.int64),  # from one position of a head to the next
        ("head_bytes", np.int64),  # from one head of a position to the next
        ("scales_at", np.int64),  # int8: after that many bytes of a side
        ("block_size", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("head_pad", np.int64),  # head_dim up to a multiple of 32, in int8 of 64
        ("dtype", np.int64),
    ]
)


@emitted
def _copy_floats(c: Code, source: Int, target: Int) -> None:
    c.store(target, c.load(source))


@emitted
def _widen_half(c: Code, source: Int, target: Int) -> None:
    c.store(target, c.load_half(source))


@emitted
def _widen_bfloat(c: Code, source: Int, target: Int) -> None:
    c.store(target, c.load_bfloat(source))


@emitted
def _narrow_half(c: Code, source: Int, target: Int) -> None:
    c.store_half(target, c.load(source))


@emitted
def _narrow_bfloat(c: Code, source: Int, target: Int) -> None:
    c.store_bfloat(target, c.load(source))


@njit(nogil=True, cache=True)
def keys_at(pool, tables, table, layer, position):  # type: ignore[no-untyped-def]
    """Address of a position's keys."""
    block = tables[table + position // pool.block_size]
    slot = position % pool.block_size
    return (
        pool.address
        + block * pool.block_bytes
        + layer * 2 * pool.side_bytes
        + slot * pool.row_bytes
    )


@njit(nogil=True, cache=True)
def read(pool, source, target):  # type: ignore[no-untyped-def]
    """16 numbers of the pool as floats."""
    if pool.dtype == FLOAT32:
        _copy_floats(source, target)
    elif pool.dtype == FLOAT16:
        _widen_half(source, target)
    else:
        _widen_bfloat(source, target)


@njit(nogil=True, cache=True)
def _write(pool, source, target):  # type: ignore[no-untyped-def]
    """16 floats into the pool."""
    if pool.dtype == FLOAT32:
        _copy_floats(source, target)
    elif pool.dtype == FLOAT16:
        _narrow_half(source, target)
    else:
        _narrow_bfloat(source, target)


@njit(nogil=True, cache=True)
def scales_at(pool, tables, table, layer, head, position):  # type: ignore[no-untyped-def]
    """Address of the scale of a position's key; its value's is side_bytes on."""
    slot = position % pool.block_size
    side = keys_at(pool, tables, table, layer, position) - slot * pool.row_bytes
    return side + pool.scales_at + (head * pool.block_size + slot) * 4


@njit(nogil=True, cache=True)
def write_row(pool, tables, table, layer, position, k, v):  # type: ignore[no-untyped-def]
    """Stores one token's keys and values, `[kv_heads * head_dim]` float32 at k and v."""
    place = keys_at(pool, tables, table, layer, position)
    if pool.dtype == INT8:
        for head in range(pool.kv_heads):
            scale = scales_at(pool, tables, table, layer, head, position)
            target, own = place + head * pool.head_bytes, head * pool.head_dim * 4
            write_key(k + own, pool.head_dim, target, scale)
            write_value(v + own, pool.head_dim, target + pool.side_bytes, scale + pool.side_bytes)
        return
    width = pool.head_bytes // pool.head_dim
    for i in range(0, pool.kv_heads * pool.head_dim, LANES):
        _write(pool, k + i * 4, place + i * width)
        _write(pool, v + i * 4, place + pool.side_bytes + i * width)
