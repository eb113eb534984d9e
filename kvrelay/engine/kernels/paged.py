"""Attention over the block pool: reads blocks where they are, copies no sequence.

Keys are looked at in tiles of 64 positions and segments of 256, cut at the same positions whoever
asks. Within a segment the softmax runs along; segments are merged in order. A decode step spreads
the segments of a sequence over threads, a prompt's chunk does not: a row's arithmetic is the same.

One tile: 64 keys are turned into a panel (tiles.py), so scores are a matmul; their softmax weights
times the panel of values are another one.
"""

import numpy as np
from numba import njit

from kvrelay.engine.kernels.rows import clear, copy_row
from kvrelay.engine.kernels.threads import take
from kvrelay.engine.kernels.tiles import ROWS_MAX, multiply_float
from kvrelay.engine.kernels.vector import LANES, Code, Int, Vec, emitted
from kvrelay.engine.shapes import LINE_BYTES, PANEL, PANEL_BYTES

KEY_TILE = 64
SEGMENT = 256
QUERY_ROWS = 96  # heads times tokens that share a tile of keys
_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 1, 2
DTYPES = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16}
_NOTHING_YET = -1e30  # a maximum; not -inf, whose difference with itself is no number
_TILE_BYTES = KEY_TILE * 4  # of a row of scores

POOL = np.dtype(
    [
        ("address", np.int64),
        ("block_bytes", np.int64),
        ("side_bytes", np.int64),  # of one layer's keys in a block; its values come next
        ("row_bytes", np.int64),  # of one position: all KV heads
        ("head_bytes", np.int64),
        ("block_size", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("head_pad", np.int64),  # head_dim up to a multiple of 32
        ("dtype", np.int64),
    ]
)

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


@emitted
def _turn_keys(
    c: Code, source: Int, source_stride: Int, target: Int, ahead: Int, ahead_stride: Int, side: Int
) -> None:
    """16 x 16 floats, rows become columns; target rows are a panel's.

    Beside each load it asks for a line of the keys at `ahead` and one of their values, `side` bytes
    on: memory answers while this tile is computed, and nowhere does a burst of requests wait.
    """
    rows = []
    for n in range(LANES):
        rows.append(c.load(source + source_stride * n).value)
        c.prefetch(ahead + ahead_stride * n)
        c.prefetch(ahead + ahead_stride * n + side)
    distance = 1
    while distance < LANES:
        for n in range(LANES):
            if n & distance == 0:
                a, b = rows[n], rows[n + distance]
                first = [i + LANES - distance if i & distance else i for i in range(LANES)]
                second = [i + LANES if i & distance else i + distance for i in range(LANES)]
                rows[n], rows[n + distance] = c.shuffle(a, b, first), c.shuffle(a, b, second)
        distance *= 2
    for n, row in enumerate(rows):
        c.store(target + n * PANEL_BYTES, Vec(c, row))


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


@emitted
def _cap(c: Code, scores: Int, softcap: Int) -> None:
    """A row of scores; softcap: an address of a float32. Both in the units of RULE."""
    limit = c.spread(softcap)
    with c.each(c.number(KEY_TILE), LANES) as i:
        c.store(scores + i * 4, c.tanh(c.load(scores + i * 4) / limit) * limit)


def _softmax(c: Code, rows: list[tuple[Int, Int, Int, Int, Int]], padded: Int) -> None:
    """For each row (scores, first, last, state, total), side by side so that they overlap:

    turns scores of keys first..last of a tile into weights, those of other keys into 0. state: the
    row's maximum so far and the sum of its weights. total `[padded]`: its values so far. Both are
    brought to the new maximum.
    """
    nothing = c.floats(float("-inf"))
    parts: list[list[Vec]] = []
    for scores, first, last, _, _ in rows:
        low, high = c.ints(first), c.ints(last)
        own = []
        for n in range(KEY_TILE // LANES):
            lanes = c.lane_numbers() + c.ints(n * LANES)
            score = c.load(scores + n * LINE_BYTES)
            own.append(c.select_between(low, lanes, high, score, nothing))
        parts.append(own)
    before = [c.spread(state) for _, _, _, state, _ in rows]
    largest = []
    for own, old in zip(parts, before, strict=True):
        a, b = c.maximum(own[0], own[1]), c.maximum(own[2], own[3])
        largest.append(c.maximum(c.maximum_lanes(c.maximum(a, b)), old))
    sums = []
    for row, own, top in zip(rows, parts, largest, strict=True):
        weights = [c.exp2(part - top) for part in own]
        for n, weight in enumerate(weights):
            c.store(row[0] + n * LINE_BYTES, weight)
        sums.append(c.sum_lanes((weights[0] + weights[1]) + (weights[2] + weights[3])))
    for row, old, top, added in zip(rows, before, largest, sums, strict=True):
        _, _, _, state, total = row
        kept = c.variable(c.spread(state + 4))
        with c.when(c.differs(old, top)):
            shrink = c.exp2(old - top)
            kept.set(kept.get() * shrink)
            c.store_first(state, top)
            with c.each(padded, LANES) as i:
                c.store(total + i * 4, c.load(total + i * 4) * shrink)
        c.store_first(state + 4, kept.get() + added)


@emitted
def _softmax_one(
    c: Code, scores: Int, first: Int, last: Int, state: Int, total: Int, padded: Int
) -> None:
    _softmax(c, [(scores, first, last, state, total)], padded)


@emitted
def _softmax_two(
    c: Code,
    scores: Int,
    first: Int,
    last: Int,
    next_first: Int,
    next_last: Int,
    state: Int,
    total: Int,
    padded: Int,
) -> None:
    """A row and the next one."""
    here = (scores, first, last, state, total)
    there = (scores + _TILE_BYTES, next_first, next_last, state + 8, total + padded * 4)
    _softmax(c, [here, there], padded)


@emitted
def _merge_row(c: Code, into: Int, into_state: Int, segment: Int, state: Int, padded: Int) -> None:
    """Adds one segment's result to a row's."""
    ours, theirs = c.spread(into_state), c.spread(state)
    largest = c.maximum(ours, theirs)
    left, right = c.exp2(ours - largest), c.exp2(theirs - largest)
    weight = c.spread(into_state + 4) * left + c.spread(state + 4) * right
    with c.each(padded, LANES) as i:
        merged = c.load(into + i * 4) * left + c.load(segment + i * 4) * right
        c.store(into + i * 4, merged)
    c.store_first(into_state, largest)
    c.store_first(into_state + 4, weight)


@emitted
def _finish_row(c: Code, total: Int, state: Int, out: Int, count: Int) -> None:
    weight = c.spread(state + 4)
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.load(total + i * 4) / weight)


@emitted
def _start_row(c: Code, state: Int, total: Int, padded: Int) -> None:
    c.store_first(state, c.floats(_NOTHING_YET))
    c.store_first(state + 4, c.floats(0.0))
    with c.each(padded, LANES) as i:
        c.store(total + i * 4, c.floats(0.0))


@emitted
def _scale(c: Code, x: Int, out: Int, factor: Int, count: Int) -> None:
    """factor: an address of a float32."""
    by = c.spread(factor)
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.load(x + i * 4) * by)


@njit(nogil=True, cache=True)
def _place(pool, tables, table, layer, position):  # type: ignore[no-untyped-def]
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
def _read(pool, source, target):  # type: ignore[no-untyped-def]
    """16 numbers of the pool as floats."""
    if pool.dtype == _FLOAT32:
        _copy_floats(source, target)
    elif pool.dtype == _FLOAT16:
        _widen_half(source, target)
    else:
        _widen_bfloat(source, target)


@njit(nogil=True, cache=True)
def _write(pool, source, target):  # type: ignore[no-untyped-def]
    """16 floats into the pool."""
    if pool.dtype == _FLOAT32:
        _copy_floats(source, target)
    elif pool.dtype == _FLOAT16:
        _narrow_half(source, target)
    else:
        _narrow_bfloat(source, target)


@njit(nogil=True, cache=True)
def write_row(pool, tables, table, layer, position, k, v):  # type: ignore[no-untyped-def]
    """Stores one token's keys and values, `[kv_heads * head_dim]` float32 at k and v."""
    place = _place(pool, tables, table, layer, position)
    width = pool.head_bytes // pool.head_dim
    for i in range(0, pool.kv_heads * pool.head_dim, LANES):
        _write(pool, k + i * 4, place + i * width)
        _write(pool, v + i * 4, place + pool.side_bytes + i * width)


@njit(nogil=True, cache=True)
def _pack_keys(  # type: ignore[no-untyped-def]
    pool, tables, table, layer, head, first, count, work, ahead, ahead_head, ahead_count
):
    """Keys first .. first + count of one head as two panels `[head_dim, 32]` at work.keys.

    Meanwhile asks memory for ahead_count positions of ahead_head from `ahead` on.
    """
    width = pool.head_bytes // pool.head_dim
    for at in range(0, count, LANES):
        following = 0
        if at < ahead_count:
            following = _place(pool, tables, table, layer, ahead + at)
            following += ahead_head * pool.head_bytes
        group = min(LANES, count - at)
        target = work.keys + at // PANEL * pool.head_dim * PANEL_BYTES + at % PANEL * 4
        place = _place(pool, tables, table, layer, first + at) + head * pool.head_bytes
        together = (first + at) % pool.block_size + LANES <= pool.block_size
        source, stride = place, pool.row_bytes
        if not together or pool.dtype != _FLOAT32:
            source, stride = work.rows, pool.head_pad * 4
            for n in range(group):
                if not together:
                    place = _place(pool, tables, table, layer, first + at + n)
                    place += head * pool.head_bytes
                for i in range(0, pool.head_dim, LANES):
                    _read(pool, place + i * width, source + n * stride + i * 4)
                if together:
                    place += pool.row_bytes
        for i in range(0, pool.head_dim, LANES):
            _turn_keys(
                source + i * 4, stride, target + i * PANEL_BYTES,
                following + i * width, pool.row_bytes, pool.side_bytes,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _pack_values(pool, tables, table, layer, head, first, count, work):  # type: ignore[no-untyped-def]
    """Values of those positions as panels `[64, 32]` at work.values."""
    place = 0
    width = pool.head_bytes // pool.head_dim
    for n in range(count):
        if n == 0 or (first + n) % pool.block_size == 0:
            place = _place(pool, tables, table, layer, first + n)
            place += pool.side_bytes + head * pool.head_bytes
        else:
            place += pool.row_bytes
        for i in range(0, pool.head_pad, LANES):
            panel = work.values + i // PANEL * KEY_TILE * PANEL_BYTES
            target = panel + n * PANEL_BYTES + i % PANEL * 4
            if i >= pool.head_dim:
                clear(target, LANES)
            else:
                _read(pool, place + i * width, target)


@njit(nogil=True, cache=True)
def _score(pool, rows, count, work):  # type: ignore[no-untyped-def]
    """work.scores `[rows, 64]` = work.queries x the `count` keys packed."""
    wide = pool.head_pad * 4
    for panel in range(0, count, PANEL):
        keys = work.keys + panel * pool.head_dim * 4
        multiply_float(
            rows, pool.head_dim, work.queries, wide, keys, PANEL_BYTES,
            work.scores + panel * 4, _TILE_BYTES, 0,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _weigh(pool, tables, table, layer, head, first, count, rows, work, totals):  # type: ignore[no-untyped-def]
    """totals `[rows, head_pad]` += work.scores x the values of these positions."""
    wide = pool.head_pad * 4
    if rows > ROWS_MAX or pool.dtype != _FLOAT32 or pool.head_pad != pool.head_dim:
        _pack_values(pool, tables, table, layer, head, first, count, work)
        for panel in range(0, pool.head_pad, PANEL):
            multiply_float(
                rows, count, work.scores, _TILE_BYTES, work.values + panel * KEY_TILE * 4,
                PANEL_BYTES, totals + panel * 4, wide, 1,
            )  # fmt: skip
        return
    n = 0
    while n < count:  # where they lie, block by block: the same sums in the same order
        place = _place(pool, tables, table, layer, first + n)
        place += pool.side_bytes + head * pool.head_bytes
        run = min(count - n, pool.block_size - (first + n) % pool.block_size)
        for panel in range(0, pool.head_dim, PANEL):
            multiply_float(
                rows, run, work.scores + n * 4, _TILE_BYTES, place + panel * 4,
                pool.row_bytes, totals + panel * 4, wide, 1,
            )  # fmt: skip
        n += run


@njit(nogil=True, cache=True)
def _softmax_rows(pool, rule, start, tile, rows, work, states, totals):  # type: ignore[no-untyped-def]
    """work.scores `[rows, 64]` of the keys from `tile` on become weights."""
    wide = pool.head_pad * 4
    row = 0
    while row < rows:
        scores = work.scores + row * _TILE_BYTES
        state, total = states + row * 8, totals + row * wide
        last = start + row // rule.group - tile
        first = max(0, last - rule.window + 1) if rule.window else 0
        if rule.softcap:
            _cap(scores, rule.softcap)
        if row + 1 == rows:
            _softmax_one(scores, first, last, state, total, pool.head_pad)
            return
        next_last = start + (row + 1) // rule.group - tile
        next_first = max(0, next_last - rule.window + 1) if rule.window else 0
        if rule.softcap:
            _cap(scores + _TILE_BYTES, rule.softcap)
        _softmax_two(
            scores, first, last, next_first, next_last, state, total, pool.head_pad
        )  # fmt: skip
        row += 2


@njit(nogil=True, cache=True)
def _attend_segment(  # type: ignore[no-untyped-def]
    pool, rule, tables, table, layer, head, segment, start, tokens, work, states, totals
):
    """Rows (token, head of the group) against one segment; their queries are at work.queries.

    states `[rows, 2]`, totals `[rows, head_pad]`: addresses of what it leaves.
    """
    rows = tokens * rule.group
    wide = pool.head_pad * 4
    for row in range(rows):
        _start_row(states + row * 8, totals + row * wide, pool.head_pad)
    end = min(start + tokens, segment + SEGMENT)
    begin = segment
    if rule.window:
        begin = max(begin, (start - rule.window + 1) // KEY_TILE * KEY_TILE)
    for tile in range(begin, end, KEY_TILE):
        count = min(KEY_TILE, end - tile)
        ahead, ahead_head = tile + KEY_TILE, head
        if ahead >= end:
            ahead, ahead_head = begin, min(head + 1, pool.kv_heads - 1)
        _pack_keys(
            pool, tables, table, layer, head, tile, count, work, ahead, ahead_head, end - ahead
        )
        _score(pool, rows, count, work)
        _softmax_rows(pool, rule, start, tile, rows, work, states, totals)
        _weigh(pool, tables, table, layer, head, tile, count, rows, work, totals)


@njit(nogil=True, cache=True)
def _load_queries(pool, rule, q, q_stride, head, tokens, work):  # type: ignore[no-untyped-def]
    """Scaled queries of one KV head's group, `[tokens * group, head_pad]`."""
    for token in range(tokens):
        source = q + token * q_stride + head * rule.group * pool.head_dim * 4
        for n in range(rule.group):
            target = work.queries + (token * rule.group + n) * pool.head_pad * 4
            _scale(source + n * pool.head_dim * 4, target, rule.scale, pool.head_dim)


@njit(nogil=True, cache=True)
def _first_segment(rule, position):  # type: ignore[no-untyped-def]
    if rule.window and position >= rule.window:
        return (position - rule.window + 1) // SEGMENT * SEGMENT
    return 0


@njit(nogil=True, cache=True)
def attend(counter, pool, rule, slices, tables, layer, q, q_stride, out, out_stride, work):  # type: ignore[no-untyped-def]
    """One thread's part of prompts' attention: pieces are some tokens of a slice with one KV head.

    q and out: addresses of rows `[q_heads * head_dim]`. Slices of one token are for attend_split.
    """
    step = max(1, QUERY_ROWS // rule.group)
    piece = take(counter)
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
                _start_row(work.states + n * 8, work.totals + n * wide, pool.head_pad)
            for segment in range(_first_segment(rule, start), start + tokens, SEGMENT):
                _attend_segment(
                    pool, rule, tables, s.table, layer, head, segment, start, tokens, work,
                    work.part_states, work.part_totals,
                )  # fmt: skip
                for n in range(rows):
                    _merge_row(
                        work.totals + n * wide, work.states + n * 8,
                        work.part_totals + n * wide, work.part_states + n * 8, pool.head_pad,
                    )  # fmt: skip
            for n in range(rows):
                target = out + (row + n // rule.group) * out_stride
                target += (head * rule.group + n % rule.group) * pool.head_dim * 4
                _finish_row(work.totals + n * wide, work.states + n * 8, target, pool.head_dim)
            piece = take(counter)
        passed += parts * pool.kv_heads


@njit(nogil=True, cache=True)
def attend_split(counter, pool, rule, slices, tables, layer, q, q_stride, partials, work):  # type: ignore[no-untyped-def]
    """One thread's part of the first half of decode attention: pieces are one token, one segment.

    partials: `[segments of all, q_heads, 16 + head_pad]` floats, a state and a total each.
    """
    heads = pool.kv_heads * rule.group
    each = (LANES + pool.head_pad) * 4
    piece = take(counter)
    passed = 0
    for s in slices:
        if s.count != 1:
            continue
        begin = _first_segment(rule, s.start)
        parts = (s.start - begin) // SEGMENT + 1
        while piece < passed + parts:
            segment = begin + (piece - passed) * SEGMENT
            place = partials + (s.partial + segment // SEGMENT) * heads * each
            for head in range(pool.kv_heads):
                _load_queries(pool, rule, q + s.row * q_stride, q_stride, head, 1, work)
                _attend_segment(
                    pool, rule, tables, s.table, layer, head, segment, s.start, 1, work,
                    work.part_states, work.part_totals,
                )  # fmt: skip
                for n in range(rule.group):
                    target = place + (head * rule.group + n) * each
                    copy_row(work.part_states + n * 8, target, LANES)
                    source = work.part_totals + n * pool.head_pad * 4
                    copy_row(source, target + LANES * 4, pool.head_pad)
            piece = take(counter)
        passed += parts


@njit(nogil=True, cache=True)
def attend_join(counter, pool, rule, slices, partials, out, out_stride, work):  # type: ignore[no-untyped-def]
    """One thread's part of the second half: a token's segments are merged in order."""
    heads = pool.kv_heads * rule.group
    each = (LANES + pool.head_pad) * 4
    piece = take(counter)
    for number in range(len(slices)):
        if number < piece:
            continue
        s = slices[number]
        if s.count == 1:
            begin = _first_segment(rule, s.start)
            for head in range(heads):
                _start_row(work.states, work.totals, pool.head_pad)
                for segment in range(begin, s.start + 1, SEGMENT):
                    place = partials + ((s.partial + segment // SEGMENT) * heads + head) * each
                    _merge_row(work.totals, work.states, place + LANES * 4, place, pool.head_pad)
                target = out + s.row * out_stride + head * pool.head_dim * 4
                _finish_row(work.totals, work.states, target, pool.head_dim)
        piece = take(counter)


# Addresses of one thread's own buffers.
WORK = np.dtype(
    [
        (name, np.int64)
        for name in (
            "queries",
            "keys",
            "values",
            "rows",
            "scores",
            "states",
            "totals",
            "part_states",
            "part_totals",
            "gate",  # of kernels/llama.py
            "up",
        )
    ]
)


def work_floats(head_dim: int, head_pad: int, group: int) -> dict[str, int]:
    """How many floats each buffer of WORK has."""
    rows = max(QUERY_ROWS, group)
    return {
        "queries": rows * head_pad,
        "keys": KEY_TILE * head_dim,
        "values": KEY_TILE * head_pad,
        "rows": LANES * head_pad,
        "scores": rows * KEY_TILE,
        "states": 2 * rows + LANES,  # copied by the vector
        "totals": rows * head_pad,
        "part_states": 2 * rows + LANES,
        "part_totals": rows * head_pad,
    }
