"""A model of the common Llama shape: its packed weights, its buffers, its threads.

ModelRunner makes it of what packing.py has packed. What a step computes is in kernels/llama.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from kvrelay.engine.kernels import llama, paged
from kvrelay.engine.kernels.threads import GUEST_ROWS_MIN, Team, aligned
from kvrelay.engine.kernels.tiles import LINEAR, ROW_BLOCK
from kvrelay.engine.kernels.vector import LANES
from kvrelay.engine.packed import linear_record
from kvrelay.engine.plan import StepPlan, make_works, pool_record
from kvrelay.engine.shapes import GROUP, GROUP_SCALE_BYTES, LINE_BYTES, FusedShape, up_to
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.kv.pool import KVPool

_ROPE_ROWS = 1024


class FusedModel:
    """Runs steps of a model whose packed weights are `weights`; `attach` a pool first.

    weights: "embedding", "final_norm", "inv_freq", "head" and "LAYER.NAME" for qkv, output,
        gate, up, down, norm, mlp_norm, and bias, q_norm, k_norm where the shape has them.
    """

    def __init__(self, shape: FusedShape, weights: Mapping[str, np.ndarray], team: Team) -> None:
        self.shape = shape
        self._weights = weights  # keeps their memory alive
        self._team = team
        self._constants = np.array(
            [shape.hidden, shape.head_dim, shape.epsilon, shape.scale * paged.LOG2_E], np.float32
        )
        self._layers = np.array(
            [
                tuple(
                    self._address(f"{n}.{name}")
                    for name in ("norm", "mlp_norm", "bias", "q_norm", "k_norm")
                )
                for n in range(shape.layers)
            ],
            llama.LAYER,
        )
        packed = shape.linears()
        records = [
            linear_record(packed[kind], self._address(f"{n}.{name}"))
            for n in range(shape.layers)
            for kind, name in enumerate(llama.LINEARS)
        ]
        self._linears = np.array(
            [*records, linear_record(packed[-1], self._address("head"))], LINEAR
        )
        self._model = self._model_record()
        self._rope_rows = 0
        self._room = _Room(shape, self._team.size, 1, 1, 1)

    def _address(self, name: str) -> int:
        array = self._weights.get(name)
        return 0 if array is None else int(array.ctypes.data)

    def _model_record(self) -> np.ndarray:
        shape, constants = self.shape, self._constants.ctypes.data
        record = np.zeros(1, llama.MODEL)
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
        if plan.tokens.min() < 0 or plan.tokens.max() >= self.shape.vocab:
            raise IndexError(f"a token id that is not below {self.shape.vocab}")
        self._reserve(plan, len(last_rows))
        room = self._room
        room.begin(plan, len(last_rows), cancelled)
        arguments = (
            self._team.seats, self._model, self._layers, self._linears, self._pools, self._rules,
            room.step, plan.slices, plan.tables, plan.row_slice, plan.tokens,
            np.array(last_rows, np.int64), room.works, plan.prompts, plan.decodes,
        )  # fmt: skip
        self._decoded = plan.decodes
        self._team.run(
            lambda thread, number: llama.run_step(thread, number, *arguments),
            with_guests=len(plan.tokens) >= GUEST_ROWS_MIN,
        )
        if cancelled.is_set() and room.stopped:
            raise StepCancelledError
        return room.logits[: len(last_rows), : self.shape.vocab]

    def profile(self) -> dict[str, float]:
        """Which part of the last step each kind of phase took, waiting for others included."""
        noted = self._room.clock[self._room.clock > 0]
        taken = np.diff(noted) / (noted[-1] - noted[0])
        in_layer = [name for name in llama.PHASES if self._has_phase(name)]
        names = ["embedding", *in_layer * self.shape.layers, "last norm", "head"]
        parts = dict.fromkeys(names, 0.0)
        for name, part in zip(names, taken, strict=True):
            parts[name] += float(part)
        return parts

    def _has_phase(self, name: str) -> bool:
        if name == "attention: join":
            return self._decoded
        return name != "quantise" or self.shape.int8

    def _reserve(self, plan: StepPlan, wanted: int) -> None:
        room = self._room
        asked = (len(plan.tokens), wanted, plan.segments)
        if not room.fits(*asked):
            held = (room.rows, room.wanted, room.segments)
            sizes = [max(has, power_of_two(needs)) for has, needs in zip(held, asked, strict=True)]
            self._room = _Room(self.shape, self._team.size, *sizes)
        if plan.longest > self._rope_rows:
            self._grow_rope(plan.longest)

    def _grow_rope(self, positions: int) -> None:
        """Angles in float32, as transformers computes them."""
        self._rope_rows = max(_ROPE_ROWS, power_of_two(positions))
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


def power_of_two(count: int) -> int:
    """The least that is not below count, or 1."""
    return 1 << max(count - 1, 0).bit_length()


class _Room:
    """Buffers of steps up to a size; made anew, larger, when a step does not fit."""

    def __init__(
        self, shape: FusedShape, threads: int, rows: int, wanted: int, segments: int
    ) -> None:
        self.rows, self.wanted, self.segments = rows, wanted, segments
        self._arrays: list[np.ndarray] = []
        self.step = np.zeros(1, llama.STEP)
        tall = max(self.rows, self.wanted)
        widths = {
            "x": (self.rows, shape.hidden),
            "normed": (tall, shape.hidden),
            "qkv": (self.rows, shape.qkv_width),
            "attended": (self.rows, shape.q_width),
            "active": (self.rows, shape.inner),
        }
        for name, (count, width) in widths.items():
            self._buffer(name, count, up_to(width, GROUP) * 4)
        widest = up_to(max(shape.hidden, shape.q_width), GROUP)
        inner = up_to(shape.inner, GROUP)
        self._buffer("bytes", tall, widest)
        self._buffer("scales", tall, widest // GROUP * GROUP_SCALE_BYTES)
        self._buffer("active_bytes", self.rows, inner)
        self._buffer("active_scales", self.rows, inner // GROUP * GROUP_SCALE_BYTES)
        vocab = up_to(shape.vocab, 32)
        logits = self._buffer("logits", self.wanted, vocab * 4).view(np.float32)
        self.logits = logits.reshape(self.wanted, -1)
        head_pad = up_to(shape.head_dim, GROUP)  # whatever the KV is stored in
        each = self.segments * shape.q_heads * (LANES + head_pad) * 4
        self.step["partials"] = (self._allocate(each).ctypes.data, 0)
        phases = shape.layers * llama.PHASES_MAX + llama.OTHER_PHASES
        self._counters = self._allocate(phases * LINE_BYTES)
        self.clock = self._allocate(phases * 8).view(np.int64)
        self._stop = self._allocate(LINE_BYTES).view(np.int64)
        self.step["counters"] = self._counters.ctypes.data
        self.step["clock"] = self.clock.ctypes.data
        self.step["stop"] = self._stop.ctypes.data
        sizes = paged.work_floats(head_pad, shape.q_heads // shape.kv_heads)
        sizes |= dict.fromkeys(("gate", "up"), ROW_BLOCK * GROUP)
        self.works, arrays = make_works(sizes, threads)
        self._arrays += arrays

    def _buffer(self, name: str, count: int, size: int) -> np.ndarray:
        # Rows an odd number of lines apart: at a multiple of 4 KiB they would all want the same few
        # places in the level 1 cache.
        stride = up_to(size, LINE_BYTES) | LINE_BYTES
        array = self._allocate(count * stride)
        self.step[name] = (array.ctypes.data, stride)
        return array

    def _allocate(self, size: int) -> np.ndarray:
        self._arrays.append(aligned(size, np.uint8))
        return self._arrays[-1]

    def fits(self, rows: int, wanted: int, segments: int) -> bool:
        return rows <= self.rows and wanted <= self.wanted and segments <= self.segments

    def begin(self, plan: StepPlan, wanted: int, cancelled: CancelFlag) -> None:
        self._counters.fill(0)
        self.clock.fill(0)
        self._stop[0] = 0
        self.step["rows"] = len(plan.tokens)
        self.step["wanted"] = wanted
        self.step["cancelled"] = cancelled.address

    @property
    def stopped(self) -> bool:
        return bool(self._stop[0])
