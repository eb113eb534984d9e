"""`kvrelay profile`: measures one model on this machine and makes a DeviceProfile of it.

Called by commands.py. First the steps of an engine alone and beside a neighbour, in processes of
their own; then what a served cluster of the same workers adds, over each link.
"""

import asyncio
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.links import LINKS
from cluster.bench.machine import QuietLooks, commit, describe_machine, unrest
from cluster.bench.report import BenchError, Report, Row
from cluster.capacity.device import BusyNeighbour, DeviceProfile, Measured
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.profiling.engines import started
from cluster.profiling.fit import Fit, fit_steps
from cluster.profiling.measuring import Effort, neighbour_slows, step_times
from cluster.profiling.served import ServedAsk, ServedTimes, measure_served
from cluster.profiling.setup import EngineInfo, EngineSetup
from cluster.profiling.steps import StepShape, all_steps, decode_steps, measurable, prompt_steps
from cluster.serving import Serving
from cluster.weights import pack_weights
from kvrelay.cache import default_cache
from kvrelay.client import KvrelayError
from kvrelay.config import KvDtype, Quantize, Transport, WorkerConfig

ERROR_MAX = 0.10  # median of the fit: beyond it a profile comes with a warning
_BATCH_MAX: int = WorkerConfig.model_fields["batch_max"].default
_VERSIONS = ("kvrelay", "torch", "transformers")


@dataclass(frozen=True)
class ProfileAsk:
    """What a person can choose. threads: 0, as `kvrelay serve` gives them to 1P + 1D."""

    quantize: Quantize = "int8"
    kv_dtype: KvDtype = "auto"
    threads: int = 0
    kv_gib: float = 1.0
    chunk_tokens: int = 256
    quick: bool = False
    command: str = "kvrelay profile"

    def options(self, link: Transport) -> ServeOptions:
        """Of the cluster that is measured, and of the threads that workers get."""
        return ServeOptions(
            port=0,
            http_port=0,
            transport=link,
            quantize=self.quantize,
            kv_dtype=self.kv_dtype,
            threads=self.threads,
            lend_cores=False,  # the simulator's workers have only their own
            kv_gib=self.kv_gib,
            chunk_tokens=self.chunk_tokens,
            local_prefill="never",
        )


@dataclass(frozen=True)
class Profiled:
    """The profile, and for people what it was made of."""

    profile: DeviceProfile
    report: Report


@dataclass(frozen=True)
class _Measured:
    """What was found out about engines."""

    info: EngineInfo
    shapes: Sequence[StepShape]
    times_ms: Sequence[float]
    neighbour: BusyNeighbour
    cores: tuple[tuple[int, ...], ...]
    blocks: int

    def fit(self) -> Fit:
        return fit_steps(list(zip(self.shapes, self.times_ms, strict=True)))


def profile_device(model: PreparedModel, asked: ProfileAsk, on_progress: Progress) -> Profiled:
    """Some minutes; seconds when it is a quick one of a small model.

    Raises:
        BenchError: the model cannot be served, or nothing can be measured.
    """
    others = QuietLooks()
    try:
        options = asked.options("shm")
        pack_weights(model.path, asked.quantize, default_cache(), on_progress)
        found = _measure_engines(model, asked, options, on_progress)
        served = [_measure_served(model, asked, link, on_progress) for link in LINKS]
    except (ServeError, KvrelayError) as error:
        raise BenchError(str(error)) from error
    fit = found.fit()
    profile = _profile(model, asked, options, found, fit, served)
    return Profiled(profile, _report(profile, found, fit, served[0], others.cores_busy()))


def _measure_engines(
    model: PreparedModel, asked: ProfileAsk, options: ServeOptions, on_progress: Progress
) -> _Measured:
    setup = EngineSetup(model.path, asked.quantize, asked.kv_dtype, options.threads_each)
    effort = Effort.of(quick=asked.quick)
    on_progress("loading the model", None)
    with started(setup) as engines:
        layout, positions_max = engines.info.layout, engines.info.positions_max
        blocks = int(asked.kv_gib * (1 << 30)) // layout.block_bytes

        def fitting(shapes: Iterable[StepShape]) -> list[StepShape]:
            return list(measurable(shapes, layout, blocks, positions_max))

        shapes = fitting(all_steps(asked.chunk_tokens, _BATCH_MAX, quick=asked.quick))
        if len(shapes) < 2:
            raise BenchError("nothing can be measured: give the KV pool more room with --kv-gib")
        prompts = fitting(prompt_steps(asked.chunk_tokens))
        decodes = fitting(decode_steps(_BATCH_MAX))
        engines.make_pools(max(s.blocks(layout) for s in (*shapes, *prompts, *decodes)))
        times_ms = step_times(engines.prefill, shapes, effort, on_progress)
        neighbour = neighbour_slows(engines, prompts, decodes, effort, on_progress)
        return _Measured(engines.info, shapes, times_ms, neighbour, engines.cores, blocks)


def _measure_served(
    model: PreparedModel, asked: ProfileAsk, link: Transport, on_progress: Progress
) -> ServedTimes:
    options = asked.options(link)
    ask = ServedAsk.of(options.block_size, options.chunk_tokens, quick=asked.quick)
    serving = Serving(model, options)
    try:
        serving.start(on_progress)
        return asyncio.run(measure_served(serving.address, link, ask, on_progress))
    finally:
        serving.stop()


def _profile(
    model: PreparedModel,
    asked: ProfileAsk,
    options: ServeOptions,
    found: _Measured,
    fit: Fit,
    served: Sequence[ServedTimes],
) -> DeviceProfile:
    machine = describe_machine(options.threads_each)
    step = served[0].with_turns(fit.step)
    layout = found.info.layout
    return DeviceProfile(
        name=f"{model.name}, {found.info.description}",
        source=Measured(
            machine=f"{machine['cpu']}, {machine['cores']} cores",
            versions={
                **{package: machine[package] for package in _VERSIONS},
                "python": platform.python_version(),
            },
            commit=commit(),
            command=asked.command,
            median_error=fit.median_error,
            p90_error=fit.p90_error,
        ),
        step=step,
        hand_offs=tuple(times.hand_off(layout.block_size) for times in served),
        router_ms=served[0].router_ms(step),
        block_tokens=layout.block_size,
        block_bytes=layout.block_bytes,
        kv_blocks=found.blocks,
        batch_max=_BATCH_MAX,
        chunk_tokens=asked.chunk_tokens,
        workers_per_host=max(1, len(found.cores)),
        busy_neighbour=_neighbour(found, served),
    )


def _neighbour(found: _Measured, served: Sequence[ServedTimes]) -> BusyNeighbour:
    """As served, where router and clients are busy, too. Workers that are not alone on their cores
    are slower all the time, which is in their steps already."""
    return (served[0].neighbour() or found.neighbour) if len(found.cores) > 1 else BusyNeighbour()


def _report(
    profile: DeviceProfile, found: _Measured, fit: Fit, served: ServedTimes, busy: float
) -> Report:
    machine: dict[str, Any] = {
        "profile": profile.name,
        **describe_machine(max(1, len(found.cores[0]) if found.cores else 1)),
        "commit": commit(),
        "others busy": busy,
    }
    rows = [
        Row(shape.name, ms, "ms", baseline=fit.step.ms(*shape.work))
        for shape, ms in zip(found.shapes, found.times_ms, strict=True)
    ]
    rows += [
        Row("fit/error/median", fit.median_error * 100, "%"),
        Row("fit/error/p90", fit.p90_error * 100, "%"),
        Row("between-steps", profile.step.base_ms - fit.step.base_ms, "ms"),
        Row(
            "between-steps/sequence", profile.step.ms_per_sequence - fit.step.ms_per_sequence, "ms"
        ),
        Row("busy-neighbour/engines/prefill", found.neighbour.prefill, "times as long"),
        Row("busy-neighbour/engines/decode", found.neighbour.decode, "times as long"),
        Row("busy-neighbour/prefill", profile.busy_neighbour.prefill, "times as long"),
        Row("busy-neighbour/decode", profile.busy_neighbour.decode, "times as long"),
        Row("router", profile.router_ms, "ms"),
    ]
    if served.both is not None:
        rows.append(Row("router/busy", served.both.router_ms, "ms"))
    for one in profile.hand_offs:
        rows.append(Row(f"hand-off/{one.link}", one.fixed_ms, "ms"))
        rows.append(Row(f"hand-off/{one.link}/block", one.ms_per_block, "ms"))
    return Report(machine, rows, (_NOTE, *_warnings(fit, found), *unrest(busy)))


_NOTE = (
    "step/T@S+bN@C: a chunk of T tokens that begins at S, beside N sequences of C tokens each;"
    " fitted: by the profile's step time, without what passes between two steps."
)


def _warnings(fit: Fit, found: _Measured) -> list[str]:
    notes = []
    if fit.median_error > ERROR_MAX:
        off = f"{fit.median_error * 100:.0f} %"
        notes.append(
            f"warning: half of the steps are off by more than {off} (10 % at most is good):"
            " measure again on a quiet machine."
        )
    if len(found.cores) < 2:
        notes.append("too few cores for two workers: nothing was measured beside a neighbour.")
    return notes
