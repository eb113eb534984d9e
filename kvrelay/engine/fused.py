"""The common Llama shape (Llama, Qwen2, Qwen3, Mistral, SmolLM ...) as one compiled call a step.

Per layer: norm, q/k/v in one matmul, rope, KV write, attention, output; norm, gate and up in one
matmul, activation, down. All threads run `_run_step`; each phase is shared out through a counter and
ends at a barrier. prepared.py makes the weights and proves the result equal to transformers' own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from kvrelay.engine.kernels import paged, rows
from kvrelay.engine.kernels.threads import Team, aligned, read_flag, take, wait_for_all, write_flag
from kvrelay.engine.kernels.tiles import GROUP, GROUP_SCALE_BYTES, LINEAR, linear
from kvrelay.engine.kernels.vector import LANES, LINE_BYTES
from kvrelay.engine.packed import PackedShape, up_to
from kvrelay.engine.plan import StepPlan, make_works, pool_record
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.kv.pool import KVPool

_LINEARS = 4  # a layer: q/k/v, output, gate/up, down
_PHASES = 11  # a layer, at most
_LAST_PHASES = 3
_ROWS_A_PIECE = 8
_ROPE_ROWS = 1024
_BARRIER_LINES = 2


@dataclass(frozen=True)
class FusedShape:
    """A model of the Llama shape. `windows`: of each layer, 0 for none."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    epsilon: float
    scale: float
    rope_scale: float
    windows: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool
    int8: bool

    @property
    def q_width(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    def linears(self) -> list[PackedShape]:
        """Of one layer, then of the head."""
        sizes = (
            (self.qkv_width, self.hidden),
            (self.hidden, self.q_width),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
            (self.vocab, self.hidden),
        )
        return [PackedShape(outputs, inputs, self.int8) for outputs, inputs in sizes]


# What a step does not change. Names ending in _at are addresses of a float32 or of a row of them.
_MODEL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "layers", "hidden", "hidden_pad", "q_heads", "kv_heads", "head_dim", "inner", "half", "embedding_at", "embedding_stride", "final_norm_at",
            "hidden_at", "head_dim_at", "epsilon_at", "cosine_at", "sine_at",
        )
    ]
)  # fmt: skip

_LAYER = np.dtype(
    [(name, np.int64) for name in ("norm_at", "mlp_norm_at", "bias_at", "q_norm_at", "k_norm_at")]
)

# One step: its buffers' addresses, each with the stride of a row in bytes where rows differ.
_STEP = np.dtype(
    [
        (name, np.int64)
        for name in (
            "rows", "wanted", "threads", "barrier", "counters", "stop", "cancelled", "x", "x_stride",
            "normed", "normed_stride", "qkv", "qkv_stride", "attended", "attended_stride", "gate_up",
            "gate_up_stride", "active", "active_stride", "quantized", "quantized_stride", "scales",
            "scales_stride", "logits", "logits_stride", "partials",
        )
    ]
)  # fmt: skip


@njit(nogil=True, cache=True)
def _to_input(groups, source, row, step):  # type: ignore[no-untyped-def]
    """An int8 matmul reads its input quantized; a float one as it is."""
    if groups:
        target = step.quantized + row * step.quantized_stride
        rows.quantize(source, groups, target, step.scales + row * step.scales_stride)


@njit(nogil=True, cache=True)
def _embed(counter, model, step, tokens):  # type: ignore[no-untyped-def]
    row = take(counter)
    while row < step.rows:
        source = model.embedding_at + tokens[row] * model.embedding_stride
        rows.copy_row(source, step.x + row * step.x_stride, model.hidden_pad)
        row = take(counter)


@njit(nogil=True, cache=True)
def _norm(counter, model, step, weight, groups):  # type: ignore[no-untyped-def]
    piece = take(counter) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            target = step.normed + row * step.normed_stride
            rows.normalize(
                step.x + row * step.x_stride, weight, target,
                model.hidden_at, model.hidden_pad, model.epsilon_at,
            )  # fmt: skip
            _to_input(groups, target, row, step)
        piece = take(counter) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _rope_and_store(counter, model, layer, number, pool, step, slices, tables, row_slice):  # type: ignore[no-untyped-def]
    """Bias, norm of q and k, rope, and the KV write of each row."""
    q_width = model.q_heads * model.head_dim
    kv_width = model.kv_heads * model.head_dim
    piece = take(counter) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            s = slices[row_slice[row]]
            position = s.start + row - s.row
            q = step.qkv + row * step.qkv_stride
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
            paged.write_row(pool, tables, s.table, number, position, k, v)
        piece = take(counter) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _quantize_rows(counter, step, source, stride, groups):  # type: ignore[no-untyped-def]
    piece = take(counter) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            _to_input(groups, source + row * stride, row, step)
        piece = take(counter) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _activate(counter, model, step, groups):  # type: ignore[no-untyped-def]
    piece = take(counter) * _ROWS_A_PIECE
    while piece < step.rows:
        for row in range(piece, min(piece + _ROWS_A_PIECE, step.rows)):
            gate = step.gate_up + row * step.gate_up_stride
            target = step.active + row * step.active_stride
            rows.gate_silu(gate, gate + model.inner * 4, target, model.inner)
            _to_input(groups, target, row, step)
        piece = take(counter) * _ROWS_A_PIECE


@njit(nogil=True, cache=True)
def _last_norm(counter, model, step, groups, last_rows):  # type: ignore[no-untyped-def]
    piece = take(counter)
    while piece < step.wanted:
        target = step.normed + piece * step.normed_stride
        rows.normalize(
            step.x + last_rows[piece] * step.x_stride, model.final_norm_at, target,
            model.hidden_at, model.hidden_pad, model.epsilon_at,
        )  # fmt: skip
        _to_input(groups, target, piece, step)
        piece = take(counter)


@njit(nogil=True, cache=True)
def _matmul(counter, layer, count, source, source_stride, step, out, out_stride, add):  # type: ignore[no-untyped-def]
    if layer.groups:
        source, source_stride = step.quantized, step.quantized_stride
    linear(
        counter, layer, count, source, source_stride, step.scales, step.scales_stride,
        out, out_stride, add,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def _run_step(  # type: ignore[no-untyped-def]
    thread, models, layers, linears, pools, rules, steps, slices, tables, row_slice, tokens,
    last_rows, works, prompts, decodes,
):  # fmt: skip
    """One thread's part of a step."""
    model, pool, step, work = models[0], pools[0], steps[0], works[thread]
    barrier, threads = step.barrier, step.threads
    counter = step.counters
    _embed(counter, model, step, tokens)
    for number in range(model.layers):
        layer, rule = layers[number], rules[number]
        qkv, output = linears[number * 4], linears[number * 4 + 1]
        gate_up, down = linears[number * 4 + 2], linears[number * 4 + 3]
        if thread == 0:
            write_flag(step.stop, read_flag(step.cancelled))
        wait_for_all(barrier, threads)
        if read_flag(step.stop):
            return
        counter += 64
        _norm(counter, model, step, layer.norm_at, qkv.groups)
        wait_for_all(barrier, threads)
        counter += 64
        _matmul(
            counter,
            qkv,
            step.rows,
            step.normed,
            step.normed_stride,
            step,
            step.qkv,
            step.qkv_stride,
            0,
        )
        wait_for_all(barrier, threads)
        counter += 64
        _rope_and_store(counter, model, layer, number, pool, step, slices, tables, row_slice)
        wait_for_all(barrier, threads)
        if prompts:
            counter += 64
            paged.attend(
                counter,
                pool,
                rule,
                slices,
                tables,
                number,
                step.qkv,
                step.qkv_stride,
                step.attended,
                step.attended_stride,
                work,
            )
        if decodes:
            counter += 64
            paged.attend_split(
                counter,
                pool,
                rule,
                slices,
                tables,
                number,
                step.qkv,
                step.qkv_stride,
                step.partials,
                work,
            )
            wait_for_all(barrier, threads)
            counter += 64
            paged.attend_join(
                counter,
                pool,
                rule,
                slices,
                step.partials,
                step.attended,
                step.attended_stride,
                work,
            )
        wait_for_all(barrier, threads)
        if output.groups:
            counter += 64
            _quantize_rows(counter, step, step.attended, step.attended_stride, output.groups)
            wait_for_all(barrier, threads)
        counter += 64
        _matmul(
            counter,
            output,
            step.rows,
            step.attended,
            step.attended_stride,
            step,
            step.x,
            step.x_stride,
            1,
        )
        wait_for_all(barrier, threads)
        counter += 64
        _norm(counter, model, step, layer.mlp_norm_at, gate_up.groups)
        wait_for_all(barrier, threads)
        counter += 64
        _matmul(
            counter,
            gate_up,
            step.rows,
            step.normed,
            step.normed_stride,
            step,
            step.gate_up,
            step.gate_up_stride,
            0,
        )
        wait_for_all(barrier, threads)
        counter += 64
        _activate(counter, model, step, down.groups)
        wait_for_all(barrier, threads)
        counter += 64
        _matmul(
            counter,
            down,
            step.rows,
            step.active,
            step.active_stride,
            step,
            step.x,
            step.x_stride,
            1,
        )
    wait_for_all(barrier, threads)
    head = linears[model.layers * 4]
    counter += 64
    _last_norm(counter, model, step, head.groups, last_rows)
    wait_for_all(barrier, threads)
    counter += 64
    _matmul(
        counter, head, step.wanted, step.normed, step.normed_stride, step,
        step.logits, step.logits_stride, 0,
    )  # fmt: skip


class FusedModel:
    """Runs steps of a model whose packed weights are `weights`; `attach` a pool first.

    weights: "embedding", "final_norm", "inv_freq", "head" and "LAYER.NAME" for qkv, output, gate_up,
    down, norm, mlp_norm, and bias, q_norm, k_norm where the shape has them; as prepared.py packs them.
    """

    def __init__(self, shape: FusedShape, weights: Mapping[str, np.ndarray], threads: int) -> None:
        self.shape = shape
        self._weights = weights  # keeps their memory alive
        self._team = Team(threads)
        self._constants = np.array(
            [shape.hidden, shape.head_dim, shape.epsilon, shape.scale], np.float32
        )
        self._layers = np.array(
            [
                tuple(
                    self._address(f"{n}.{name}")
                    for name in ("norm", "mlp_norm", "bias", "q_norm", "k_norm")
                )
                for n in range(shape.layers)
            ],
            _LAYER,
        )
        packed = shape.linears()
        records = [
            packed[kind].record(self._address(f"{n}.{name}"))
            for n in range(shape.layers)
            for kind, name in enumerate(("qkv", "output", "gate_up", "down"))
        ]
        self._linears = np.array([*records, packed[-1].record(self._address("head"))], LINEAR)
        self._model = self._model_record()
        self._rope_rows = 0
        self._room = _Room(shape, threads, 0, 0, 0)

    def _address(self, name: str) -> int:
        array = self._weights.get(name)
        return 0 if array is None else int(array.ctypes.data)

    def _model_record(self) -> np.ndarray:
        shape, constants = self.shape, self._constants.ctypes.data
        record = np.zeros(1, _MODEL)
        fields = {
            "layers": shape.layers,
            "hidden": shape.hidden,
            "hidden_pad": up_to(shape.hidden, GROUP),
            "q_heads": shape.q_heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "inner": shape.inner,
            "half": shape.head_dim // 2,
            "embedding_at": self._address("embedding"),
            "embedding_stride": up_to(shape.hidden, GROUP) * 4,
            "final_norm_at": self._address("final_norm"),
            "hidden_at": constants,
            "head_dim_at": constants + 4,
            "epsilon_at": constants + 8,
        }
        for name, value in fields.items():
            record[name] = value
        return record

    def attach(self, pool: KVPool) -> None:
        """pool.kv is where KV lives from now on."""
        self._pool = pool
        self._pools = pool_record(pool)
        shape = self.shape
        scale = self._constants.ctypes.data + 12
        group = shape.q_heads // shape.kv_heads
        self._rules = np.array([(group, window, scale, 0) for window in shape.windows], paged.RULE)

    @property
    def weight_bytes(self) -> int:
        """Weights that every decode step reads."""
        packed = self.shape.linears()
        return sum(p.size_bytes for p in packed[:-1]) * self.shape.layers + packed[-1].size_bytes

    def step(
        self, slices: Sequence[Slice], last_rows: Sequence[int], cancelled: CancelFlag
    ) -> np.ndarray:
        """Logits `[len(last_rows), vocab]` of those rows, valid until the next step.

        Raises:
            StepCancelledError: `cancelled` was set meanwhile.
        """
        plan = StepPlan(slices, self._pool.layout.block_size)
        self._reserve(plan, len(last_rows))
        room = self._room
        room.begin(plan, len(last_rows), self._team.threads, cancelled)
        arguments = (
            self._model, self._layers, self._linears, self._pools, self._rules, room.step, plan.slices,
            plan.tables, plan.row_slice, plan.tokens, np.array(last_rows, np.int64), room.works,
            plan.prompts, plan.decodes,
        )  # fmt: skip
        self._team.run(lambda thread: _run_step(thread, *arguments))
        if cancelled.is_set() and room.stopped:
            raise StepCancelledError
        return room.logits[: len(last_rows), : self.shape.vocab]

    def _reserve(self, plan: StepPlan, wanted: int) -> None:
        if not self._room.fits(len(plan.tokens), wanted, plan.segments):
            self._room = _Room(
                self.shape, self._team.threads, len(plan.tokens), wanted, plan.segments, self._room
            )
        if plan.longest > self._rope_rows:
            self._grow_rope(plan.longest)

    def _grow_rope(self, positions: int) -> None:
        """Angles in float32, as transformers computes them."""
        self._rope_rows = max(_ROPE_ROWS, 1 << (positions - 1).bit_length())
        steps = np.arange(self._rope_rows, dtype=np.float32)
        angles = np.outer(steps, self._weights["inv_freq"][: self.shape.head_dim // 2]).astype(
            np.float32
        )
        scale = np.float32(self.shape.rope_scale)
        self._rope = []
        for name, turn in (("cosine_at", np.cos), ("sine_at", np.sin)):
            table = aligned(angles.size + LANES, np.float32)  # short heads read beyond their row
            table[: angles.size] = (turn(angles) * scale).reshape(-1)
            self._rope.append(table)
            self._model[name] = table.ctypes.data

    def close(self) -> None:
        self._team.close()


class _Room:
    """Buffers of steps up to a size; made anew, larger, when a step does not fit."""

    def __init__(
        self, shape: FusedShape, threads: int, rows: int, wanted: int, segments: int,
        before: "_Room | None" = None,
    ) -> None:  # fmt: skip
        self.rows = max(rows, before.rows if before else 1)
        self.wanted = max(wanted, before.wanted if before else 1)
        self.segments = max(segments, before.segments if before else 1)
        self._arrays: list[np.ndarray] = []
        self.step = np.zeros(1, _STEP)
        tall = max(self.rows, self.wanted)
        widths = {
            "x": (self.rows, shape.hidden),
            "normed": (tall, shape.hidden),
            "qkv": (self.rows, shape.qkv_width),
            "attended": (self.rows, shape.q_width),
            "gate_up": (self.rows, 2 * shape.inner),
            "active": (self.rows, shape.inner),
        }
        for name, (count, width) in widths.items():
            wide = up_to(width, GROUP)
            self._buffer(name, count, wide * 4)
        widest = up_to(max(shape.hidden, shape.q_width, shape.inner), GROUP)
        self._buffer("quantized", tall, widest)
        self._buffer("scales", tall, widest // GROUP * GROUP_SCALE_BYTES)
        vocab = up_to(shape.vocab, 32)
        self.logits = (
            self._buffer("logits", self.wanted, vocab * 4).view(np.float32).reshape(-1, vocab)
        )
        head_pad = up_to(shape.head_dim, 32)
        self._allocate("partials", self.segments * shape.q_heads * (LANES + head_pad) * 4)
        self._counters = self._allocate(
            "counters", (shape.layers * _PHASES + _LAST_PHASES) * LINE_BYTES
        )
        self._allocate("barrier", _BARRIER_LINES * LINE_BYTES)
        self._stop = self._allocate("stop", LINE_BYTES).view(np.int64)
        sizes = paged.work_floats(shape.head_dim, head_pad, shape.q_heads // shape.kv_heads)
        self.works, arrays = make_works(sizes, threads)
        self._arrays += arrays

    def _buffer(self, name: str, count: int, stride: int) -> np.ndarray:
        self.step[f"{name}_stride"] = stride
        return self._allocate(name, count * stride)

    def _allocate(self, name: str, size: int) -> np.ndarray:
        array = aligned(size, np.uint8)
        self._arrays.append(array)
        self.step[name] = array.ctypes.data
        return array

    def fits(self, rows: int, wanted: int, segments: int) -> bool:
        return rows <= self.rows and wanted <= self.wanted and segments <= self.segments

    def begin(self, plan: StepPlan, wanted: int, threads: int, cancelled: CancelFlag) -> None:
        self._counters.fill(0)
        self._stop[0] = 0
        self.step["rows"] = len(plan.tokens)
        self.step["wanted"] = wanted
        self.step["threads"] = threads
        self.step["cancelled"] = cancelled.address

    @property
    def stopped(self) -> bool:
        return bool(self._stop[0])
