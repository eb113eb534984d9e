"""Attention over the block pool: reads blocks where they are, copies no sequence.

Keys are looked at in tiles of 64 positions and segments of 256, cut at the same positions whoever
asks. Within a segment the softmax runs along; segments are merged in order. A decode step spreads
the segments of a sequence over threads, a prompt's chunk does not: a row's arithmetic is the same.
"""

import numpy as np
from numba import njit

from kvrelay.engine.kernels import float_segment, int8_segment
from kvrelay.engine.kernels.cuts import first_segment
from kvrelay.engine.kernels.int8_softmax import LEVELS
from kvrelay.engine.kernels.pool import INT8
from kvrelay.engine.kernels.rows import copy_row
from kvrelay.engine.kernels.softmax import KEY_TILE, SEGMENT, finish_row, merge_row, start_row
from kvrelay.engine.kernels.threads import take
from kvrelay.engine.kernels.vector import LANES
from kvrelay.engine.shapes import up_to

QUERY_ROWS = 96

# How one layer attends. Scores are to the base 2 here, their weights powers of 2: scale and softcap
# are the model's own times LOG2_E.
LOG2_E = 1.4426950408889634
RULE = np.dtype(
    [
        ("group", np.int64),  # query heads to a KV head
        ("window", np.int64),  # 0: none
        ("scale", np.int64),  # address of a float32
        ("softcap", np.int64),  # address of a float32; 0: none
    ]
)

# One sequence's tokens in a step: rows row .. row + count are positions start .. start + count.
SLICE = np.dtype(
    [
        ("row", np.int64),
        ("start", np.int64),
        ("count", np.int64),
        ("table", np.int64),  # of its block ids, in the step's tables
        ("partial", np.int64),  # decode: its first segment in the step's partial results
    ]
)


@njit(nogil=True, cache=True)
def _load_queries(pool, rule, q, q_stride, head, tokens, work):  # type: ignore[no-untyped-def]
    if pool.dtype == INT8:
        int8_segment.load_queries(pool, rule, q, q_stride, head, tokens, work)
    else:
        float_segment.load_queries(pool, rule, q, q_stride, head, tokens, work)


@njit(nogil=True, cache=True)
def _attend_segment(  # type: ignore[no-untyped-def]
    pool, rule, tables, table, layer, head, segment, start, tokens, work
):
    """Rows (token, head of the group) that _load_queries has loaded against one segment.

    Leaves work.part_states `[rows, 2]` and work.part_totals `[rows, head_pad]`.
    """
    if pool.dtype == INT8:
        int8_segment.attend_segment(
            pool, rule, tables, table, layer, head, segment, start, tokens, work
        )
    else:
        float_segment.attend_segment(
            pool, rule, tables, table, layer, head, segment, start, tokens, work
        )


@njit(nogil=True, cache=True)
def attend(counter, seat, pool, rule, slices, tables, layer, q, q_stride, out, out_stride, work):  # type: ignore[no-untyped-def]
    """One thread's part of prompts' attention: pieces are some tokens of a slice with one KV head.

    q and out: addresses of rows `[q_heads * head_dim]`. Slices of one token are for attend_split.
    """
    step = max(1, QUERY_ROWS // rule.group)
    piece = take(counter, seat)
    passed = 0
    wide = pool.head_pad * 4
    for s in slices:
        if s.count == 1:
            continue
        parts = (s.count + step - 1) // step
        while piece < passed + parts * pool.kv_heads:
            # The last tokens first: they look at most.
            offset = (parts - 1 - (piece - passed) // pool.kv_heads) * step
            head = (piece - passed) % pool.kv_heads
            tokens = min(step, s.count - offset)
            start = s.start + offset
            row = s.row + offset
            _load_queries(pool, rule, q + row * q_stride, q_stride, head, tokens, work)
            rows = tokens * rule.group
            for n in range(rows):
                start_row(work.states + n * 8, work.totals + n * wide, pool.head_pad)
            for segment in range(first_segment(rule, start), start + tokens, SEGMENT):
                _attend_segment(
                    pool, rule, tables, s.table, layer, head, segment, start, tokens, work
                )
                for n in range(rows):
                    merge_row(
                        work.totals + n * wide, work.states + n * 8,
                        work.part_totals + n * wide, work.part_states + n * 8, pool.head_pad,
                    )  # fmt: skip
            for n in range(rows):
                target = out + (row + n // rule.group) * out_stride
                target += (head * rule.group + n % rule.group) * pool.head_dim * 4
                finish_row(work.totals + n * wide, work.states + n * 8, target, pool.head_dim)
            piece = take(counter, seat)
        passed += parts * pool.kv_heads


@njit(nogil=True, cache=True)
def attend_split(counter, seat, pool, rule, slices, tables, layer, q, q_stride, partials, work):  # type: ignore[no-untyped-def]
    """One thread's part of the first half of decode attention: pieces are one token, one segment.

    partials: `[segments of all, q_heads, 16 + head_pad]` floats, a state and a total each.
    """
    heads = pool.kv_heads * rule.group
    each = (LANES + pool.head_pad) * 4
    piece = take(counter, seat)
    passed = 0
    for s in slices:
        if s.count != 1:
            continue
        begin = first_segment(rule, s.start)
        parts = (s.start - begin) // SEGMENT + 1
        while piece < passed + parts:
            segment = begin + (piece - passed) * SEGMENT
            place = partials + (s.partial + segment // SEGMENT) * heads * each
            for head in range(pool.kv_heads):
                _load_queries(pool, rule, q + s.row * q_stride, q_stride, head, 1, work)
                _attend_segment(pool, rule, tables, s.table, layer, head, segment, s.start, 1, work)
                for n in range(rule.group):
                    target = place + (head * rule.group + n) * each
                    copy_row(work.part_states + n * 8, target, LANES)
                    source = work.part_totals + n * pool.head_pad * 4
                    copy_row(source, target + LANES * 4, pool.head_pad)
            piece = take(counter, seat)
        passed += parts


@njit(nogil=True, cache=True)
def attend_join(counter, seat, pool, rule, slices, partials, out, out_stride, work):  # type: ignore[no-untyped-def]
    """One thread's part of the second half: a token's segments are merged in order."""
    heads = pool.kv_heads * rule.group
    each = (LANES + pool.head_pad) * 4
    piece = take(counter, seat)
    for number in range(len(slices)):
        if number < piece:
            continue
        s = slices[number]
        if s.count == 1:
            begin = first_segment(rule, s.start)
            for head in range(heads):
                start_row(work.states, work.totals, pool.head_pad)
                for segment in range(begin, s.start + 1, SEGMENT):
                    place = partials + ((s.partial + segment // SEGMENT) * heads + head) * each
                    merge_row(work.totals, work.states, place + LANES * 4, place, pool.head_pad)
                target = out + s.row * out_stride + head * pool.head_dim * 4
                finish_row(work.totals, work.states, target, pool.head_dim)
        piece = take(counter, seat)


# Addresses of one thread's own buffers.
WORK = np.dtype(
    [
        (name, np.int64)
        for name in (
            "queries",
            "query_scales",  # int8
            "keys",
            "values",
            "rows",
            "row_scales",  # int8
            "scales",  # int8: of the tile's keys and values
            "scores",
            "weights",  # int8
            "levels",  # int8: see int8_softmax.py
            "states",
            "totals",
            "part_states",
            "part_totals",
            "gate",  # of kernels/llama.py
            "up",
        )
    ]
)


def work_floats(head_pad: int, group: int) -> dict[str, int]:
    """How many floats each buffer of WORK has. int8 needs no more of those that it shares."""
    rows = max(QUERY_ROWS, group)
    return {
        "queries": rows * head_pad,
        "query_scales": 2 * rows,
        "keys": KEY_TILE * head_pad,
        "values": KEY_TILE * head_pad,
        "rows": LANES * head_pad,
        "row_scales": 2 * LANES,
        "scales": 3 * KEY_TILE,
        "scores": rows * KEY_TILE,
        "weights": rows * KEY_TILE // 4,
        "levels": LEVELS * up_to(rows, LANES),
        "states": 2 * rows + LANES,  # copied by the vector
        "totals": rows * head_pad,
        "part_states": 2 * rows + LANES,
        "part_totals": rows * head_pad,
    }
