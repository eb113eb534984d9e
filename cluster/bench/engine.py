"""`kvrelay bench engine`: prefill and decode of one engine, beside transformers and the machine.

Called by commands.py. Measures one engine in one process, with neither router nor workers.
"""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import psutil

from cluster.bench import loading
from cluster.bench.cases import Case, all_cases, measurable
from cluster.bench.limits import (
    LimitProbe,
    MachineLimits,
    ModelShape,
    decode_compute_limit,
    decode_limit,
    prefill_limit,
)
from cluster.bench.loading import EngineChoice
from cluster.bench.machine import OtherPrograms, describe_machine, unrest
from cluster.bench.profile import profile_rows
from cluster.bench.report import BenchError, Report, Row
from cluster.bench.timing import Budget, Work, interleaved_medians, timed
from cluster.bench.transformers_side import TransformersSide
from cluster.model_store import PreparedModel
from cluster.preparation import Progress
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool

UNIT = "tokens/s"
_KV_SHARE_MAX = 0.7  # of the memory that is free: the rest is for activations
_WARM_UP = (Case("prefill", 1, 32), Case("decode", 1, 16))

INT8_NOTE = (
    "int8: the limit of prefill is that of fp32 products all the same, so it can be passed; the "
    "limit of decode is that of reading alone."
)


@dataclass(frozen=True)
class EngineBench:
    """What a person can choose. `compare`: with transformers, or with nothing."""

    engine: EngineChoice
    compare: bool = True
    chunk_tokens: int = 256
    quick: bool = False
    profile: bool = False


class KvrelaySide:
    """Our engine with a pool. Each method gives a piece of Work for `interleaved_medians`."""

    def __init__(self, runner: ModelRunner, pool: KVPool, vocab: int, chunk_tokens: int) -> None:
        self._runner = runner
        self._chunk_tokens = chunk_tokens
        self._random = random.Random(0)
        self._vocab = vocab
        # In no order, as the blocks of a worker that has served for a while.
        self._blocks = self._random.sample(range(pool.blocks), pool.blocks)

    def prefill(self, tokens: int) -> Work:
        """In chunks, as a prefill worker does it, up to the first token."""
        blocks = self._blocks[: self._runner.layout.blocks_for(tokens)]
        prompt = self._random_tokens(tokens)
        starts = range(0, tokens, self._chunk_tokens)
        chunks = [Slice(prompt[at : at + self._chunk_tokens], at, blocks) for at in starts]

        def prefill() -> None:
            for chunk in chunks:
                self._runner.step([chunk], [chunk.end == tokens]).numpy().argmax(-1)

        return lambda: timed(prefill)

    def last_chunk(self, tokens: int) -> list[Slice]:
        """The last step of a prompt of that length."""
        count = min(tokens, self._chunk_tokens)
        blocks = self._blocks[: self._runner.layout.blocks_for(tokens)]
        return [Slice(self._random_tokens(count), tokens - count, blocks)]

    def decode_step(self, batch: int, context: int) -> list[Slice]:
        """One token a sequence."""
        each = self._runner.layout.blocks_for(context + 1)
        return [
            Slice([token], context, self._blocks[row * each : (row + 1) * each])
            for row, token in enumerate(self._random_tokens(batch))
        ]

    def decode(self, batch: int, context: int) -> Work:
        """One step, up to the tokens chosen."""
        slices = self.decode_step(batch, context)
        wanted = [True] * batch
        return lambda: timed(lambda: self._runner.step(slices, wanted).numpy().argmax(-1))

    def _random_tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(count)]


@dataclass(frozen=True)
class _Measured:
    """Seconds that a case takes; of `tokens`."""

    case: Case
    ours_s: float
    theirs_s: float | None
    limits: MachineLimits

    @property
    def tokens(self) -> int:
        return self.case.tokens if self.case.phase == "prefill" else self.case.batch


def bench_engine(model: PreparedModel, asked: EngineBench, on_progress: Progress) -> Report:
    """Measures `model`. Minutes; seconds when `quick`.

    Raises:
        BenchError: the model cannot be served, or not one row can be measured.
    """
    others = OtherPrograms()
    with ExitStack() as stack:
        on_progress("loading the model", None)
        outline = loading.outline(model.path)
        runner = stack.enter_context(loading.loaded_runner(model.path, asked.engine, on_progress))
        theirs = None
        if asked.compare:
            on_progress("loading transformers' model", None)
            theirs = TransformersSide(loading.load_transformers(model.path), runner.layout)
        config = outline.config.get_text_config()
        ends = (getattr(config, "max_position_embeddings", None), runner.context_limit)
        cases, notes = measurable(
            all_cases(quick=asked.quick),
            runner.layout,
            positions_max=min((end for end in ends if end), default=None),
            kv_bytes_max=_kv_bytes_max(runner.layout, theirs is not None),
        )
        if not cases:
            raise BenchError(f"nothing can be measured: {notes[0]}")
        blocks = max(case.kv_bytes(runner.layout) for case in cases) // runner.layout.block_bytes
        pool = stack.enter_context(loading.attached_pool(runner, blocks))
        ours = KvrelaySide(runner, pool, config.vocab_size, asked.chunk_tokens)
        measured = _measure(cases, ours, theirs, asked.quick, on_progress)
        rows = _rows(measured, _Limited.of(outline, runner, asked.engine))
        if asked.profile:
            on_progress("looking into single steps", None)
            profiles = profile_rows(runner, [(c.name, _slices(ours, c)) for c in cases])
            rows += profiles or []
            notes += [] if profiles else ["--profile: only fused models have phases"]
        machine = _machine(model, asked, runner, theirs, [one.limits for one in measured])
    machine["others_busy_cores"] = others.cores_busy()
    notes += [INT8_NOTE] if asked.engine.quantize == "int8" else []
    return Report(machine, rows, notes + unrest(machine["others_busy_cores"]))


def _slices(ours: "KvrelaySide", case: Case) -> list[Slice]:
    if case.phase == "prefill":
        return ours.last_chunk(case.tokens)
    return ours.decode_step(case.batch, case.tokens)


def _kv_bytes_max(layout: KVLayout, compared: bool) -> float:
    """transformers keeps as many tokens as we do, in fp32."""
    theirs = replace(layout, dtype="float32").block_bytes / layout.block_bytes if compared else 0.0
    return psutil.virtual_memory().available * _KV_SHARE_MAX / (1 + theirs)


def _measure(
    cases: Sequence[Case],
    ours: "KvrelaySide",
    theirs: TransformersSide | None,
    quick: bool,
    on_progress: Progress,
) -> list[_Measured]:
    """All rows, one after another, each with the machine's limits while it was measured."""
    budget = Budget.quick() if quick else Budget()
    both = [side for side in (ours, theirs) if side is not None]
    on_progress("warming up", None)
    for case in _WARM_UP:
        for side in both:
            _work(side, case)()
    probe = LimitProbe()
    measured = []
    for index, case in enumerate(cases):
        on_progress(f"measuring {case.name}", index / len(cases))
        works = [_work(side, case) for side in both]
        times = interleaved_medians([*works, *probe.works], budget)
        limits = probe.limits(times[len(both) :])
        measured.append(_Measured(case, times[0], times[1] if theirs else None, limits))
    return measured


def _work(side: "KvrelaySide | TransformersSide", case: Case) -> Work:
    if case.phase == "prefill":
        return side.prefill(case.tokens)
    return side.decode(case.batch, case.tokens)


@dataclass(frozen=True)
class _Limited:
    """What of a model and its engine the limits depend on."""

    shape: ModelShape
    weight_bytes: int
    kv_token_bytes: int
    integers: bool  # the matrix products are not fp32

    @classmethod
    def of(cls, outline: object, runner: ModelRunner, engine: EngineChoice) -> "_Limited | None":
        layout = runner.layout
        shape = ModelShape.of(outline, layers=layout.layers, head_dim=layout.head_dim)
        if shape is None:
            return None
        integers = engine.quantize != "none"
        return cls(
            shape=shape,
            weight_bytes=runner.weight_bytes if integers else shape.weight_bytes_fp32,
            kv_token_bytes=layout.block_bytes // layout.block_size,
            integers=integers,
        )

    def limit(self, case: Case, limits: MachineLimits) -> float:
        """Tokens per second. Of a decode step, whichever is nearer: reading or arithmetic."""
        if case.phase == "prefill":
            return prefill_limit(self.shape, case.tokens, limits.gemm_flops_s)
        reading = decode_limit(
            batch=case.batch,
            context=case.tokens,
            weight_bytes=self.weight_bytes,
            kv_token_bytes=self.kv_token_bytes,
            read_bytes_s=limits.read_bytes_s,
        )
        if self.integers:
            return reading
        work = (self.shape, case.batch, case.tokens)
        return min(reading, decode_compute_limit(*work, limits.gemm_flops_s))


def _rows(measured: Sequence[_Measured], model: _Limited | None) -> list[Row]:
    return [
        Row(
            one.case.name,
            one.tokens / one.ours_s,
            UNIT,
            baseline=one.tokens / one.theirs_s if one.theirs_s else None,
            limit=model.limit(one.case, one.limits) if model else None,
        )
        for one in measured
    ]


def _machine(
    model: PreparedModel,
    asked: EngineBench,
    runner: ModelRunner,
    theirs: TransformersSide | None,
    limits: Sequence[MachineLimits],
) -> dict[str, Any]:
    return {
        **describe_machine(asked.engine.threads),
        "model": model.name,
        "engine": runner.description,
        "quantize": asked.engine.quantize,
        "kv_dtype": runner.layout.dtype,
        "chunk_tokens": asked.chunk_tokens,
        "baseline": theirs.description if theirs else "none",
        "gemm_gflop_s": median(one.gemm_flops_s for one in limits) / 1e9,
        "read_gb_s": median(one.read_bytes_s for one in limits) / 1e9,
    }
