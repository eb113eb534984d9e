"""Attention to one segment of keys that are stored as floats of any width. Called by paged.py.

One tile: 64 keys are turned into a panel (tiles.py), so scores are a matmul; their softmax weights
times the panel of values are another one.
"""

from numba import njit

from kvrelay.engine.kernels.cuts import tile_after, tiles_of
from kvrelay.engine.kernels.pool import FLOAT32, keys_at, read
from kvrelay.engine.kernels.rows import clear
from kvrelay.engine.kernels.shuffles import turn_keys
from kvrelay.engine.kernels.softmax import KEY_TILE, TILE_BYTES, softmax_rows, start_row
from kvrelay.engine.kernels.tiles import ROWS_MAX, multiply_float
from kvrelay.engine.kernels.vector import LANES, Code, Int, emitted
from kvrelay.engine.shapes import PANEL, PANEL_BYTES


@emitted
def _scale(c: Code, x: Int, out: Int, factor: Int, count: Int) -> None:
    """factor: an address of a float32."""
    by = c.spread(factor)
    with c.each(count, LANES) as i:
        c.store(out + i * 4, c.load(x + i * 4) * by)


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
            following = keys_at(pool, tables, table, layer, ahead + at)
            following += ahead_head * pool.head_bytes
        group = min(LANES, count - at)
        target = work.keys + at // PANEL * pool.head_dim * PANEL_BYTES + at % PANEL * 4
        place = keys_at(pool, tables, table, layer, first + at) + head * pool.head_bytes
        together = (first + at) % pool.block_size + LANES <= pool.block_size
        source, stride = place, pool.row_bytes
        if not together or pool.dtype != FLOAT32:
            source, stride = work.rows, pool.head_pad * 4
            for n in range(group):
                if not together:
                    place = keys_at(pool, tables, table, layer, first + at + n)
                    place += head * pool.head_bytes
                for i in range(0, pool.head_dim, LANES):
                    read(pool, place + i * width, source + n * stride + i * 4)
                if together:
                    place += pool.row_bytes
        for i in range(0, pool.head_dim, LANES):
            turn_keys(
                source + i * 4, stride, target + i * PANEL_BYTES, PANEL_BYTES,
                following + i * width, pool.row_bytes, pool.side_bytes,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _pack_values(pool, tables, table, layer, head, first, count, work):  # type: ignore[no-untyped-def]
    """Values of those positions as panels `[64, 32]` at work.values."""
    place = 0
    width = pool.head_bytes // pool.head_dim
    for n in range(count):
        if n == 0 or (first + n) % pool.block_size == 0:
            place = keys_at(pool, tables, table, layer, first + n)
            place += pool.side_bytes + head * pool.head_bytes
        else:
            place += pool.row_bytes
        for i in range(0, pool.head_pad, LANES):
            panel = work.values + i // PANEL * KEY_TILE * PANEL_BYTES
            target = panel + n * PANEL_BYTES + i % PANEL * 4
            if i >= pool.head_dim:
                clear(target, LANES)
            else:
                read(pool, place + i * width, target)


@njit(nogil=True, cache=True)
def _score(pool, rows, count, work):  # type: ignore[no-untyped-def]
    """work.scores `[rows, 64]` = work.queries x the `count` keys packed."""
    wide = pool.head_pad * 4
    for panel in range(0, count, PANEL):
        keys = work.keys + panel * pool.head_dim * 4
        multiply_float(
            rows, pool.head_dim, work.queries, wide, keys, PANEL_BYTES,
            work.scores + panel * 4, TILE_BYTES, 0,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _weigh(pool, tables, table, layer, head, first, count, rows, work, totals):  # type: ignore[no-untyped-def]
    """totals `[rows, head_pad]` += work.scores x the values of these positions."""
    wide = pool.head_pad * 4
    if rows > ROWS_MAX or pool.dtype != FLOAT32 or pool.head_pad != pool.head_dim:
        _pack_values(pool, tables, table, layer, head, first, count, work)
        for panel in range(0, pool.head_pad, PANEL):
            multiply_float(
                rows, count, work.scores, TILE_BYTES, work.values + panel * KEY_TILE * 4,
                PANEL_BYTES, totals + panel * 4, wide, 1,
            )  # fmt: skip
        return
    n = 0
    while n < count:  # where they lie, block by block: the same sums in the same order
        place = keys_at(pool, tables, table, layer, first + n)
        place += pool.side_bytes + head * pool.head_bytes
        run = min(count - n, pool.block_size - (first + n) % pool.block_size)
        for panel in range(0, pool.head_dim, PANEL):
            multiply_float(
                rows, run, work.scores + n * 4, TILE_BYTES, place + panel * 4,
                pool.row_bytes, totals + panel * 4, wide, 1,
            )  # fmt: skip
        n += run


@njit(nogil=True, cache=True)
def load_queries(pool, rule, q, q_stride, head, tokens, work):  # type: ignore[no-untyped-def]
    """Scaled queries of one KV head's group, `[tokens * group, head_pad]`."""
    for token in range(tokens):
        source = q + token * q_stride + head * rule.group * pool.head_dim * 4
        for n in range(rule.group):
            target = work.queries + (token * rule.group + n) * pool.head_pad * 4
            _scale(source + n * pool.head_dim * 4, target, rule.scale, pool.head_dim)


@njit(nogil=True, cache=True)
def attend_segment(  # type: ignore[no-untyped-def]
    pool, rule, tables, table, layer, head, segment, start, tokens, work
):
    """Rows (token, head of the group) against one segment; their queries are at work.queries.

    states `[rows, 2]`, totals `[rows, head_pad]`: addresses of what it leaves.
    """
    states, totals = work.part_states, work.part_totals
    rows = tokens * rule.group
    wide = pool.head_pad * 4
    for row in range(rows):
        start_row(states + row * 8, totals + row * wide, pool.head_pad)
    begin, end = tiles_of(rule, segment, start, tokens)
    for tile in range(begin, end, KEY_TILE):
        count = min(KEY_TILE, end - tile)
        ahead, ahead_head = tile_after(pool, tile, begin, end, head)
        _pack_keys(
            pool, tables, table, layer, head, tile, count, work, ahead, ahead_head, end - ahead
        )
        _score(pool, rows, count, work)
        softmax_rows(pool, rule, start, tile, rows, work, states, totals)
        _weigh(pool, tables, table, layer, head, tile, count, rows, work, totals)
