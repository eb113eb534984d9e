"""One step of the common Llama shape (Llama, Qwen2, Qwen3, Mistral, SmolLM ...), compiled whole.

Per layer: norm, q/k/v in one matmul, rope, KV write, attention, output; norm, gate and up in one
matmul, activation, down. All threads run `run_step`; each phase is shared out through a counter of
its own. Called by fused.py; packing.py proves it equal to transformers' own.
"""

import numpy as np
from numba import njit

from kvrelay.engine.kernels import paged, rows
from kvrelay.engine.kernels.pool import write_row
from kvrelay.engine.kernels.threads import (
    begin_step,
    end_step,
    next_phase,
    note_time,
    read_flag,
    take,
    write_flag,
)
from kvrelay.engine.kernels.tiles import BUFFER, ROW_BLOCK, linear, multiply
from kvrelay.engine.shapes import GROUP, GROUP_SCALE_BYTES, LINE_BYTES, PANEL, PANEL_BYTES

# Phases of a layer as a profile names them; those that a step has no need of are left out.
PHASES = (
    "norm",
    "q/k/v",
    "rope, KV write",
    "attention",
    "attention: join",
    "quantise",
    "output",
    "norm",
    "gate, up, activation",
    "down",
)
LINEARS = ("qkv", "output", "gate", "up", "down")  # of a layer; after the last layer comes the head
PHASES_MAX = 11  # of a layer
OTHER_PHASES = 4  # the start, the embedding, the last norm, the head
_ROWS_A_PIECE = 2

# What a step does not change. Names ending in _at are addresses of a float32 or of a row of them.
MODEL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "layers",
            "hidden",
            "hidden_pad",
            "q_heads",
            "kv_heads",
            "head_dim",
            "inner",
            "half",
            "embedding_at",
            "embedding_stride",
            "final_norm_at",
            "hidden_at",
            "head_dim_at",
            "epsilon_at",
            "cosine_at",
            "sine_at",
        )
    ]
)

LAYER = np.dtype(
    [(name, np.int64) for name in ("norm_at", "mlp_norm_at", "bias_at", "q_norm_at", "k_norm_at")]
)

BUFFERS = (
    "x",  # what layers add to
    "normed",
    "qkv",
    "attended",
    "active",
    "bytes",  # normed or attended in int8, and
    "scales",  # its scales
    "active_bytes",
    "active_scales",
    "logits",
    "partials",  # of decode attention, see paged.attend_split
)

STEP = np.dtype(
    [
        (name, np.int64)
        for name in (
            "rows",
            "wanted",
            "counters",
            "clock",
            "stop",
            "cancelled",
        )
    ]
    + [(name, BUFFER) for name in BUFFERS]
)


@njit(nogil=True, cache=True)
def _next_phase(counter, step, thread, seat):  # type: ignore[no-untyped-def]
    """Ends a phase, notes the time; gives the counter of the next phase."""
    next_phase(thread, seat, counter + LINE_BYTES)
    if thread == 0:
        note_time(step.clock + (counter - step.counters) // LINE_BYTES * 8)
    return counter + LINE_BYTES


@njit(nogil=True, cache=True)
def _to_input(groups, source, row, step):  # type: ignore[no-untyped-def]
    """An int8 matmul reads its input quantized; a float one as it is."""
    if groups:
        target = step.bytes.at + row * step.bytes.stride
        rows.quantize(source, groups, target, step.scales.at + row * step.scales.stride)


@njit(nogil=True, cache=True)
def _embed(counter, seat, model, step, tokens):  # type: ignore[no-untyped-def]
    row = take(counter, seat)
    while row < step.rows:
        source = model.embedding_at + tokens[row] * model.embedding_stride
        rows.copy_row(source, step.x.at + row * step.x.stride, model.hidden_pad)
        row = take(counter, seat)


@njit(nogil=True, cache=True)
def _norm(counter, seat, model, step, weight, groups):  # type: ignore[no-untyped-def]
    piece = take(counter, seat) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            target = step.normed.at + row * step.normed.stride
            rows.normalize(
                step.x.at + row * step.x.stride, weight, target,
                model.hidden_at, model.hidden_pad, model.epsilon_at,
            )  # fmt: skip
            _to_input(groups, target, row, step)
        piece = take(counter, seat) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _rope_and_store(counter, seat, model, layer, number, pool, step, slices, tables, row_slice):  # type: ignore[no-untyped-def]
    """Bias, norm of q and k, rope, and the KV write of each row."""
    q_width = model.q_heads * model.head_dim
    kv_width = model.kv_heads * model.head_dim
    piece = take(counter, seat) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            s = slices[row_slice[row]]
            position = s.start + row - s.row
            q = step.qkv.at + row * step.qkv.stride
            k, v = q + q_width * 4, q + (q_width + kv_width) * 4
            if layer.bias_at:
                rows.add_row(q, layer.bias_at, q_width + 2 * kv_width)
            cosine = model.cosine_at + position * model.half * 4
            sine = model.sine_at + position * model.half * 4
            for head in range(model.q_heads + model.kv_heads):
                place = q + head * model.head_dim * 4
                norm = layer.q_norm_at if head < model.q_heads else layer.k_norm_at
                if norm:
                    rows.normalize(
                        place, norm, place, model.head_dim_at, model.head_dim, model.epsilon_at
                    )
                rows.rotate(place, model.half, cosine, sine)
            write_row(pool, tables, s.table, number, position, k, v)
        piece = take(counter, seat) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _quantize_rows(counter, seat, step, source, groups):  # type: ignore[no-untyped-def]
    piece = take(counter, seat) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            _to_input(groups, source.at + row * source.stride, row, step)
        piece = take(counter, seat) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _gate_and_up(counter, seat, gate, up, model, step, work):  # type: ignore[no-untyped-def]
    """active = silu(normed x gate) * (normed x up), quantized where the next matmul wants that.

    A piece is a block of rows and 64 outputs of either: what lies between stays in the cache.
    """
    groups = (model.inner + GROUP - 1) // GROUP
    pieces = (step.rows + ROW_BLOCK - 1) // ROW_BLOCK * groups
    piece = take(counter, seat)
    while piece < pieces:
        first, group = piece // groups * ROW_BLOCK, piece % groups
        count = min(ROW_BLOCK, step.rows - first)
        _two_panels(gate, group, first, count, step, work.gate)
        _two_panels(up, group, first, count, step, work.up)
        for row in range(count):
            at = row * GROUP * 4
            target = step.active.at + (first + row) * step.active.stride + group * GROUP * 4
            rows.gate_silu(work.gate + at, work.up + at, target, GROUP)
        if gate.groups:
            for row in range(first, first + count):
                source = step.active.at + row * step.active.stride + group * GROUP * 4
                bytes_at = step.active_bytes.at + row * step.active_bytes.stride
                scales_at = step.active_scales.at + row * step.active_scales.stride
                rows.quantize(
                    source, 1, bytes_at + group * GROUP, scales_at + group * GROUP_SCALE_BYTES
                )
        piece = take(counter, seat)


@njit(nogil=True, cache=True)
def _two_panels(layer, group, first, count, step, out):  # type: ignore[no-untyped-def]
    """out `[count, 64]` = rows of normed x 64 outputs of a layer; those it lacks are 0."""
    for half in range(2):
        number = group * 2 + half
        there = out + half * PANEL_BYTES
        if number >= layer.panels:
            for row in range(count):
                rows.clear(there + row * GROUP * 4, PANEL)
        else:
            multiply(
                layer,
                number,
                first,
                count,
                step.normed,
                step.bytes,
                step.scales,
                there,
                GROUP * 4,
                0,
            )


@njit(nogil=True, cache=True)
def _last_norm(counter, seat, model, step, groups, last_rows):  # type: ignore[no-untyped-def]
    piece = take(counter, seat)
    while piece < step.wanted:
        target = step.normed.at + piece * step.normed.stride
        rows.normalize(
            step.x.at + last_rows[piece] * step.x.stride, model.final_norm_at, target,
            model.hidden_at, model.hidden_pad, model.epsilon_at,
        )  # fmt: skip
        _to_input(groups, target, piece, step)
        piece = take(counter, seat)


@njit(nogil=True, cache=True)
def _attention(  # type: ignore[no-untyped-def]
    counter, pool, rule, number, step, slices, tables, prompts, decodes, work, thread, seat
):  # fmt: skip
    """Prompts' chunks and decode steps, each with counters of their own."""
    q, out = step.qkv, step.attended
    if prompts:
        paged.attend(
            counter, seat, pool, rule, slices, tables, number, q.at, q.stride, out.at, out.stride,
            work,
        )  # fmt: skip
    counter += LINE_BYTES
    if decodes:
        partials = step.partials.at
        paged.attend_split(
            counter, seat, pool, rule, slices, tables, number, q.at, q.stride, partials, work
        )  # fmt: skip
        counter = _next_phase(counter, step, thread, seat)
        paged.attend_join(counter, seat, pool, rule, slices, partials, out.at, out.stride, work)
    return counter


@njit(nogil=True, cache=True)
def _run(  # type: ignore[no-untyped-def]
    thread, seat, model, layers, linears, pool, rules, step, slices, tables, row_slice, tokens,
    last_rows, work, prompts, decodes,
):  # fmt: skip
    counter = _next_phase(step.counters, step, thread, seat)
    _embed(counter, seat, model, step, tokens)
    for number in range(model.layers):
        layer, rule = layers[number], rules[number]
        base = number * len(LINEARS)
        qkv, output = linears[base], linears[base + 1]
        gate, up, down = linears[base + 2], linears[base + 3], linears[base + 4]
        if thread == 0:
            write_flag(step.stop, read_flag(step.cancelled))
        counter = _next_phase(counter, step, thread, seat)
        if read_flag(step.stop):
            return
        _norm(counter, seat, model, step, layer.norm_at, qkv.groups)
        counter = _next_phase(counter, step, thread, seat)
        linear(counter, seat, qkv, step.rows, step.normed, step.bytes, step.scales, step.qkv, 0)
        counter = _next_phase(counter, step, thread, seat)
        _rope_and_store(counter, seat, model, layer, number, pool, step, slices, tables, row_slice)
        counter = _next_phase(counter, step, thread, seat)
        counter = _attention(
            counter, pool, rule, number, step, slices, tables, prompts, decodes, work,
            thread, seat,
        )  # fmt: skip
        counter = _next_phase(counter, step, thread, seat)
        if output.groups:
            _quantize_rows(counter, seat, step, step.attended, output.groups)
            counter = _next_phase(counter, step, thread, seat)
        linear(counter, seat, output, step.rows, step.attended, step.bytes, step.scales, step.x, 1)
        counter = _next_phase(counter, step, thread, seat)
        _norm(counter, seat, model, step, layer.mlp_norm_at, gate.groups)
        counter = _next_phase(counter, step, thread, seat)
        _gate_and_up(counter, seat, gate, up, model, step, work)
        counter = _next_phase(counter, step, thread, seat)
        linear(
            counter, seat, down, step.rows, step.active, step.active_bytes, step.active_scales,
            step.x, 1,
        )  # fmt: skip
    counter = _next_phase(counter, step, thread, seat)
    head = linears[model.layers * len(LINEARS)]
    _last_norm(counter, seat, model, step, head.groups, last_rows)
    counter = _next_phase(counter, step, thread, seat)
    linear(counter, seat, head, step.wanted, step.normed, step.bytes, step.scales, step.logits, 0)
    _next_phase(counter, step, thread, seat)


@njit(nogil=True, cache=True)
def run_step(  # type: ignore[no-untyped-def]
    thread, number, seats, models, layers, linears, pools, rules, steps, slices, tables, row_slice,
    tokens, last_rows, works, prompts, decodes,
):  # fmt: skip
    """One thread's part of the step with this number; all but the first and the last two are
    arrays of records."""
    seat = seats[thread]
    if begin_step(thread, seat, number):
        _run(
            thread, seat, models[0], layers, linears, pools[0], rules, steps[0], slices, tables,
            row_slice, tokens, last_rows, works[thread], prompts, decodes,
        )  # fmt: skip
        end_step(thread, seat)
