"""Attention to one segment of keys that are stored in int8. Called by paged.py.

One tile: the bytes of 64 keys are turned into a panel, with which queries in int8 have exact dot
products. A row's weights in the tile become bytes of 0 to 255 of the row's own largest there, so
that the weighted sum of values is made of exact dot products too. What is added up in float32 is
one such sum a tile, in the order of the tiles: which rows are beside a row does not matter.

A value's scale is part of its weight: 2^(score + log2(scale)). The sum of the weights, which a row
is divided by in the end, is of weights without it.
"""

from numba import njit

from kvrelay.engine.kernels.cuts import tile_after, tiles_of
from kvrelay.engine.kernels.functions import log2
from kvrelay.engine.kernels.int8_head import write_query
from kvrelay.engine.kernels.int8_softmax import (
    ADDED,
    FACTORS,
    LARGEST,
    SHRINKS,
    SUMS,
    advance,
    score_all,
    score_capped,
    score_some,
    start_levels,
    weigh,
)
from kvrelay.engine.kernels.pool import keys_at, scales_at
from kvrelay.engine.kernels.rows import clear
from kvrelay.engine.kernels.shuffles import quads_of, turn_keys
from kvrelay.engine.kernels.softmax import KEY_TILE, TILE_BYTES
from kvrelay.engine.kernels.tiles import HAS_VNNI
from kvrelay.engine.kernels.vector import LANES, Code, Int, Ints, Vec, emitted
from kvrelay.engine.shapes import GROUP, LINE_BYTES

_VECTORS = 4  # 64 keys, or 64 dimensions of a value
_ROWS_MAX = 6  # with as many sums each, what registers hold
_QUAD_BYTES = _VECTORS * LINE_BYTES  # of a panel: four dimensions of 64 keys, or the other way


def _dots(
    c: Code, rows: list[Ints], quads: Int, at: list[Int], panel: Int, *, unsigned_panel: bool
) -> list[list[Ints]]:
    """rows[i] plus the dot products of the bytes at at[i] with a panel `[quads, 64, 4]`."""
    sums = [[c.variable(start) for _ in range(_VECTORS)] for start in rows]
    with c.each(quads) as k:
        columns = [c.load_ints(panel + k * _QUAD_BYTES + n * LINE_BYTES) for n in range(_VECTORS)]
        for own, address in zip(sums, at, strict=True):
            value = c.spread_ints(address + k * 4)
            for total, column in zip(own, columns, strict=True):
                pair = (column, value) if unsigned_panel else (value, column)
                total.set(c.dot_bytes(total.get(), *pair, HAS_VNNI))
    return [[total.get() for total in own] for own in sums]


@emitted
def _score(
    c: Code, rows: Int, quads: Int, q: Int, q_stride: Int, q_scales: Int, keys: Int, out: Int
) -> None:
    """out `[rows, 64]` int32 = dot products of queries and keys, both without their scales."""

    def emit(count: int) -> None:
        starts = [c.spread_ints(q_scales + row * 8 + 4) for row in range(count)]
        at = [q + q_stride * row for row in range(count)]
        for row, sums in enumerate(_dots(c, starts, quads, at, keys, unsigned_panel=True)):
            for n, total in enumerate(sums):
                c.store_ints(out + row * _QUAD_BYTES + n * LINE_BYTES, total)

    c.cases(rows, emit, range(1, _ROWS_MAX + 1))


@emitted
def _add_weighted(
    c: Code,
    rows: Int,
    quads: Int,
    weights: Int,
    values: Int,
    shrinks: Int,
    factors: Int,
    totals: Int,
    stride: Int,
) -> None:
    """totals `[rows, 64]` = themselves * shrinks + weights x values * factors, a row each."""

    def emit(count: int) -> None:
        starts = [c.ints(0)] * count
        at = [weights + row * KEY_TILE for row in range(count)]
        for row, sums in enumerate(_dots(c, starts, quads, at, values, unsigned_panel=False)):
            shrink, factor = c.spread(shrinks + row * 4), c.spread(factors + row * 4)
            for n, total in enumerate(sums):
                place = totals + stride * row + n * LINE_BYTES
                c.store(place, c.fma(c.to_float(total), factor, c.load(place) * shrink))

    c.cases(rows, emit, range(1, _ROWS_MAX + 1))


@emitted
def _turn_values(c: Code, source: Int, stride: Int, target: Int) -> None:
    """16 values' 64 bytes as four quads of a panel."""
    for quad in range(LANES // 4):
        rows = [c.load_bytes(source + stride * (quad * 4 + n)) for n in range(4)]
        for n, part in enumerate(quads_of(c, rows)):
            c.store_bytes(target + quad * _QUAD_BYTES + n * LINE_BYTES, part)


@emitted
def _copy_line(c: Code, source: Int, target: Int) -> None:
    c.store(target, c.load_line(source))


@emitted
def _copy_one(c: Code, source: Int, target: Int) -> None:
    c.store_first(target, c.spread(source))


@emitted
def _read_scales(c: Code, keys: Int, values: Int, valid: Int, out: Int) -> None:
    """Scales of 16 keys and values, for `[3, 64]`: the key's; the value's log2 and its inverse.

    Those from `valid` on may be anything: they are given numbers that do no harm.
    """
    first, last = c.ints(0), c.ints(valid - 1)

    def chosen(address: Int, other: float) -> Vec:
        own = c.load(address)
        return c.select_between(first, c.lane_numbers(), last, own, c.floats(other))

    value = chosen(values, 1.0)
    c.store(out, chosen(keys, 0.0))
    c.store(out + TILE_BYTES, log2(c, value))
    c.store(out + 2 * TILE_BYTES, c.floats(1.0) / value)


@emitted
def _finish_state(c: Code, levels: Int, stride: Int, state: Int) -> None:
    """A row's state as softmax.py has it."""
    c.store_first(state, c.spread(levels + stride * LARGEST))
    c.store_first(state + 4, c.spread(levels + stride * SUMS))


@njit(nogil=True, cache=True)
def _gather(pool, tables, table, layer, head, first, count, work):  # type: ignore[no-untyped-def]
    """16 positions that do not lie side by side, as they would at work.rows, [keys, values]; their
    scales likewise at work.row_scales. Those from count on repeat the last."""
    for n in range(LANES):
        position = first + min(n, count - 1)
        source = keys_at(pool, tables, table, layer, position) + head * pool.head_bytes
        scale = scales_at(pool, tables, table, layer, head, position)
        for side in range(2):
            target = work.rows + (side * LANES + n) * pool.row_bytes
            for i in range(0, pool.row_bytes, LINE_BYTES):
                _copy_line(source + side * pool.side_bytes + i, target + i)
            own = work.row_scales + (side * LANES + n) * 4
            _copy_one(scale + side * pool.side_bytes, own)


@njit(nogil=True, cache=True)
def _pack(  # type: ignore[no-untyped-def]
    pool, tables, table, layer, head, first, count, work, ahead, ahead_head, ahead_count
):
    """Positions first .. first + count of one head: panels at work.keys and work.values, for each
    64 dimensions one, and `[3, 64]` numbers at work.scales.

    Meanwhile asks memory for ahead_count positions of ahead_head from `ahead` on.
    """
    panel_bytes = GROUP * KEY_TILE
    for at in range(0, count, LANES):
        following = 0
        if at < ahead_count:
            following = keys_at(pool, tables, table, layer, ahead + at)
            following += ahead_head * pool.head_bytes
        group = min(LANES, count - at)
        if (first + at) % pool.block_size + LANES <= pool.block_size:
            source = keys_at(pool, tables, table, layer, first + at) + head * pool.head_bytes
            scale = scales_at(pool, tables, table, layer, head, first + at)
            side = pool.side_bytes
            _read_scales(scale, scale + side, group, work.scales + at * 4)
        else:
            _gather(pool, tables, table, layer, head, first + at, group, work)
            source, side = work.rows, LANES * pool.row_bytes
            scale = work.row_scales
            _read_scales(scale, scale + LANES * 4, group, work.scales + at * 4)
        for i in range(0, pool.row_bytes, GROUP):
            panel = i // GROUP * panel_bytes
            turn_keys(
                source + i, pool.row_bytes, work.keys + panel + at * 4, _QUAD_BYTES,
                following + i, pool.row_bytes, pool.side_bytes,
            )  # fmt: skip
            target = work.values + panel + at // 4 * _QUAD_BYTES
            _turn_values(source + side + i, pool.row_bytes, target)


@njit(nogil=True, cache=True)
def _weigh_rows(rule, start, tile, first_row, rows, work, level_bytes):  # type: ignore[no-untyped-def]
    """work.scores `[rows, 64]` become bytes at work.weights, from first_row on."""
    for n in range(rows):
        row = first_row + n
        last = start + row // rule.group - tile
        first = max(0, last - rule.window + 1) if rule.window else 0
        scores, scale = work.scores + n * _QUAD_BYTES, work.query_scales + row * 8
        top = work.levels + row * 4
        if rule.softcap:
            score_capped(scores, scale, work.scales, first, last, rule.softcap, top)
        elif first > 0 or last < KEY_TILE - 1:
            score_some(scores, scale, work.scales, first, last, top)
        else:
            score_all(scores, scale, work.scales, top)
    for n in range(rows):
        row = first_row + n
        top, added = work.levels + row * 4, work.levels + row * 4 + ADDED * level_bytes
        scores = work.scores + n * _QUAD_BYTES
        weigh(scores, work.scales, top, work.weights + row * KEY_TILE, added)


@njit(nogil=True, cache=True)
def attend_segment(  # type: ignore[no-untyped-def]
    pool, rule, tables, table, layer, head, segment, start, tokens, work
):
    """As float_segment.attend_segment."""
    states, totals = work.part_states, work.part_totals
    rows = tokens * rule.group
    wide = pool.head_pad * 4
    clear(totals, rows * pool.head_pad)
    level_bytes = (rows + LANES - 1) // LANES * LINE_BYTES
    start_levels(work.levels, level_bytes)
    begin, end = tiles_of(rule, segment, start, tokens)
    for tile in range(begin, end, KEY_TILE):
        count = min(KEY_TILE, end - tile)
        ahead, ahead_head = tile_after(pool, tile, begin, end, head)
        _pack(pool, tables, table, layer, head, tile, count, work, ahead, ahead_head, end - ahead)
        for row in range(0, rows, _ROWS_MAX):
            some = min(_ROWS_MAX, rows - row)
            _score(
                some, pool.row_bytes // 4, work.queries + row * pool.row_bytes, pool.row_bytes,
                work.query_scales + row * 8, work.keys, work.scores,
            )  # fmt: skip
            _weigh_rows(rule, start, tile, row, some, work, level_bytes)
        advance(work.levels, level_bytes)
        for row in range(0, rows, _ROWS_MAX):
            some = min(_ROWS_MAX, rows - row)
            level = work.levels + row * 4
            for i in range(0, pool.row_bytes, GROUP):
                _add_weighted(
                    some, (count + 3) // 4, work.weights + row * KEY_TILE,
                    work.values + i * KEY_TILE, level + SHRINKS * level_bytes,
                    level + FACTORS * level_bytes, totals + row * wide + i * 4, wide,
                )  # fmt: skip
    for row in range(rows):
        _finish_state(work.levels + row * 4, level_bytes, states + row * 8)


@njit(nogil=True, cache=True)
def load_queries(pool, rule, q, q_stride, head, tokens, work):  # type: ignore[no-untyped-def]
    """Queries of one KV head's group in int8, `[tokens * group, row_bytes]`, and their scales."""
    for token in range(tokens):
        source = q + token * q_stride + head * rule.group * pool.head_dim * 4
        for n in range(rule.group):
            row = token * rule.group + n
            write_query(
                source + n * pool.head_dim * 4, pool.head_dim, rule.scale,
                work.queries + row * pool.row_bytes, work.query_scales + row * 8,
            )  # fmt: skip
