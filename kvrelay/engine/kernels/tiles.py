"""The matrix kernel: a few rows times one panel of 32 outputs. All matmuls go through it.

A panel holds 32 outputs side by side, so that one row of it is two vectors. Every output is added
up in the order of its inputs, whatever rows are computed beside it: a row's result has the same
bits alone and in any batch.

fp32 panel: `[inputs, 32]` float32.
int8 panel: for each group of 64 inputs `[16, 32, 4]` uint8 (a weight is the byte less 128), then
the group's scales `[32]` float32. int8 rows: see rows.quantize.
"""

import numpy as np
from llvmlite import binding
from numba import njit

from kvrelay.engine.kernels.threads import begin_step, end_step, next_phase, take
from kvrelay.engine.kernels.vector import Code, Int, Variable, emitted
from kvrelay.engine.shapes import (
    GROUP,
    GROUP_BYTES,
    GROUP_SCALE_BYTES,
    LINE_BYTES,
    PANEL,
    PANEL_BYTES,
)

ROWS_MAX = 14  # with two vectors each, as many sums as registers hold
ROWS_INT8 = 7  # of many rows: int8 has two sums, one of integers within a group
_VECTORS = 2
_ROWS_STREAMED = 2  # so few rows wait for the weights, and so ask for them ahead
_AHEAD_BYTES = 2048
ROW_BLOCK = 6 * ROWS_MAX  # rows that stay in the level 2 cache while panels pass by

HAS_VNNI = bool(binding.get_host_cpu_features().get("avx512vnni"))


def _start(c: Code, count: int, out: Int, out_stride: Int, add: Int) -> list[list[Variable]]:
    """Sums of `count` rows: what is there when `add`, else 0.

    So a sum over many inputs is the same bits whether it is made at once or in parts.
    """
    sums = [[c.variable(c.floats(0.0)) for _ in range(_VECTORS)] for _ in range(count)]
    with c.when(add):
        for row, vectors in enumerate(sums):
            for n, total in enumerate(vectors):
                total.set(c.load(out + out_stride * row + n * LINE_BYTES))
    return sums


def _finish(c: Code, sums: list[list[Variable]], out: Int, out_stride: Int) -> None:
    for row, vectors in enumerate(sums):
        for n, total in enumerate(vectors):
            c.store(out + out_stride * row + n * LINE_BYTES, total.get())


@emitted
def _tile_float(
    c: Code,
    rows: Int,
    inputs: Int,
    a: Int,
    a_stride: Int,
    panel: Int,
    panel_stride: Int,
    out: Int,
    out_stride: Int,
    add: Int,
) -> None:
    def emit(count: int) -> None:
        sums = _start(c, count, out, out_stride, add)
        with c.each(inputs) as k:
            weights = [c.load(panel + k * panel_stride + n * LINE_BYTES) for n in range(_VECTORS)]
            for row in range(count):
                value = c.spread(a + a_stride * row + k * 4)
                for n in range(_VECTORS):
                    sums[row][n].set(c.fma(value, weights[n], sums[row][n].get()))
        _finish(c, sums, out, out_stride)

    c.cases(rows, emit, range(1, ROWS_MAX + 1))


@emitted
def _tile_int8(
    c: Code,
    rows: Int,
    groups: Int,
    a: Int,
    a_stride: Int,
    scales: Int,
    scales_stride: Int,
    panel: Int,
    out: Int,
    out_stride: Int,
    add: Int,
) -> None:
    def emit(count: int) -> None:
        sums = _start(c, count, out, out_stride, add)
        with c.each(groups) as g:
            block, own = panel + g * GROUP_BYTES, scales + g * GROUP_SCALE_BYTES
            exact = []
            for row in range(count):
                start = c.spread_ints(own + scales_stride * row + 4)
                exact.append([c.variable(start) for _ in range(_VECTORS)])
            with c.each(c.number(GROUP // 4)) as k:
                weights = [
                    c.load_bytes(block + k * PANEL_BYTES + n * LINE_BYTES) for n in range(_VECTORS)
                ]
                if count <= _ROWS_STREAMED:
                    for n in range(_VECTORS):
                        ahead = _AHEAD_BYTES + n * LINE_BYTES
                        c.prefetch(block + k * PANEL_BYTES + ahead)
                for row in range(count):
                    values = c.spread_ints(a + a_stride * row + g * GROUP + k * 4)
                    for n in range(_VECTORS):
                        total = exact[row][n]
                        total.set(c.dot_bytes(total.get(), weights[n], values, HAS_VNNI))
            of_weights = [
                c.load_line(block + GROUP * PANEL + n * LINE_BYTES) for n in range(_VECTORS)
            ]
            for row in range(count):
                of_row = c.spread(own + scales_stride * row)
                for n in range(_VECTORS):
                    whole = c.to_float(exact[row][n].get())
                    sums[row][n].set(c.fma(whole, of_row * of_weights[n], sums[row][n].get()))
        _finish(c, sums, out, out_stride)

    c.cases(rows, emit, range(1, ROWS_MAX + 1))


@njit(nogil=True, cache=True)
def multiply_float(rows, inputs, a, a_stride, panel, panel_stride, out, out_stride, add):  # type: ignore[no-untyped-def]
    """out `[rows, 32]` (+)= a `[rows, inputs]` x panel; addresses, and strides in bytes."""
    row = 0
    while row < rows:
        count = min(ROWS_MAX, rows - row)
        here, there = a + row * a_stride, out + row * out_stride
        _tile_float(count, inputs, here, a_stride, panel, panel_stride, there, out_stride, add)
        row += count


@njit(nogil=True, cache=True)
def multiply_int8(rows, groups, a, a_stride, scales, scales_stride, panel, out, out_stride, add):  # type: ignore[no-untyped-def]
    """As multiply_float, of quantized rows and an int8 panel."""
    row = 0
    while row < rows:
        count = min(ROWS_INT8, rows - row) if rows > ROWS_MAX else rows
        here, there = a + row * a_stride, out + row * out_stride
        own = scales + row * scales_stride
        _tile_int8(count, groups, here, a_stride, own, scales_stride, panel, there, out_stride, add)
        row += count


LINEAR = np.dtype(
    [
        ("address", np.int64),  # of the first panel
        ("panels", np.int64),
        ("panel_bytes", np.int64),
        ("inputs", np.int64),  # fp32
        ("groups", np.int64),  # int8; 0 says fp32
    ]
)


BUFFER = np.dtype([("at", np.int64), ("stride", np.int64)])  # an address, bytes of a row


@njit(nogil=True, cache=True)
def multiply(layer, number, first, count, source, quantized, scales, out, out_stride, add):  # type: ignore[no-untyped-def]
    """out `[count, 32]` (+)= rows first .. first + count x the number-th panel of a LINEAR.

    source, quantized, scales: BUFFERs; an int8 layer reads the latter two. out: an address.
    """
    panel = layer.address + number * layer.panel_bytes
    if layer.groups:
        multiply_int8(
            count, layer.groups,
            quantized.at + first * quantized.stride, quantized.stride,
            scales.at + first * scales.stride, scales.stride,
            panel, out, out_stride, add,
        )  # fmt: skip
    else:
        multiply_float(
            count, layer.inputs, source.at + first * source.stride, source.stride,
            panel, PANEL_BYTES, out, out_stride, add,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def linear(counter, seat, layer, rows, source, quantized, scales, out, add):  # type: ignore[no-untyped-def]
    """One thread's part of out `[rows, outputs]` (+)= source x layer, all BUFFERs but the LINEAR.

    Threads take pieces (some rows, one panel) from `counter` until none is left.
    """
    pieces = (rows + ROW_BLOCK - 1) // ROW_BLOCK * layer.panels
    piece = take(counter, seat)
    while piece < pieces:
        first, number = piece // layer.panels * ROW_BLOCK, piece % layer.panels
        count = min(ROW_BLOCK, rows - first)
        there = out.at + first * out.stride + number * PANEL_BYTES
        multiply(
            layer, number, first, count, source, quantized, scales, there, out.stride, add
        )  # fmt: skip
        piece = take(counter, seat)


@njit(nogil=True, cache=True)
def run_linear(thread, number, seats, counter, layer, rows, source, quantized, scales, out, add):  # type: ignore[no-untyped-def]
    """`linear` as a step of its own, for Team.run."""
    seat = seats[thread]
    if begin_step(thread, seat, number):
        next_phase(thread, seat, counter)
        linear(counter, seat, layer, rows, source, quantized, scales, out, add)
        next_phase(thread, seat, counter + LINE_BYTES)
        end_step(thread, seat)
