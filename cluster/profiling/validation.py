"""Whether the simulator tells the truth: one workload for real on this machine, and simulated.

Called by commands.py. Both have one prefill and one decode worker, and the same requests at the
same times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.machine import QuietLooks, describe_machine, unrest
from cluster.bench.report import BenchError, Report, Row
from cluster.capacity.device import DeviceProfile
from cluster.capacity.run import Setting, SimulationError, simulate
from cluster.load.plan import LoadError, Plan, Target
from cluster.load.run import run_load
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.serving import Serving
from cluster.weights import pack_weights
from cluster.workload.asks import Workload
from cluster.workload.figures import Figures, Quantiles, figures
from cluster.workload.mixes import make_mix
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo
from kvrelay.cache import default_cache
from kvrelay.config import KvDtype, LocalPrefill, Quantize

GOAL = 0.15  # by so much p50 and p90 of TTFT and TPOT may be off
_SLO = Slo(ttft_ms=2000.0, tpot_ms=150.0)  # the figures ask for one; nothing here goes by it
_JUDGED = ("ttft", "tpot")
_JUDGED_PERCENTS = ("p50", "p90")


@dataclass(frozen=True)
class ValidationAsk:
    """What a person can choose. Requests that are due within warm_up_s are asked, and left out of
    the figures: workers and router have to learn first what steps take."""

    rate: float
    seconds: float
    warm_up_s: float
    quantize: Quantize
    kv_dtype: KvDtype = "auto"
    threads: int = 0  # as the profile was measured with; 0: as `kvrelay serve`
    local_prefill: LocalPrefill = "auto"
    seed: int = 0

    def workload(self) -> Workload:
        return make_mix("uniform", self.rate, self.warm_up_s + self.seconds, self.seed)

    def options(self, profile: DeviceProfile) -> ServeOptions:
        return ServeOptions(
            port=0,
            http_port=0,
            quantize=self.quantize,
            kv_dtype=self.kv_dtype,
            threads=self.threads,
            lend_cores=False,  # nor do simulated workers
            kv_gib=profile.kv_blocks * profile.block_bytes / (1 << 30),
            chunk_tokens=profile.chunk_tokens,
            local_prefill=self.local_prefill,
        )


def validate(
    model: PreparedModel, profile: DeviceProfile, asked: ValidationAsk, on_progress: Progress
) -> Report:
    """Raises BenchError when the model cannot be served, or an answer failed in one of them."""
    others = QuietLooks()
    workload = asked.workload()
    options = asked.options(profile)
    pack_weights(model.path, asked.quantize, default_cache(), on_progress)
    real = _counted(_for_real(model, options, workload, asked, on_progress), asked, "for real")
    on_progress("simulating", None)
    simulated = _counted(_simulated(profile, options, workload), asked, "simulated")
    machine: dict[str, Any] = {
        **describe_machine(options.threads_each),
        "profile": f"{profile.name}, {profile.source}",
        "rate": asked.rate,
        "requests": real.requests,
        "seed": asked.seed,
    }
    rows = compared(real, simulated)
    return Report(machine, rows, (_NOTE, verdict(rows), *unrest(others.cores_busy())))


_NOTE = (
    "value: simulated; real: the same requests, by `kvrelay serve` with 1 + 1 workers on this"
    " machine. Requests beside the router and the load generator, on the same cores."
)


def compared(real: Figures, simulated: Figures) -> list[Row]:
    """Simulated, with what was real as the baseline."""
    rows = []
    for name in ("ttft", "tpot", "itl", "queue", "prefill", "hand_off"):
        ours, theirs = getattr(simulated, f"{name}_ms"), getattr(real, f"{name}_ms")
        rows += _quantile_rows(name, ours, theirs)
    tokens = simulated.output_tokens_per_s, real.output_tokens_per_s
    rows.append(Row("output", tokens[0], "tokens/s", tokens[1]))
    return rows


def _quantile_rows(name: str, ours: Quantiles | None, theirs: Quantiles | None) -> list[Row]:
    if ours is None or theirs is None:
        return []
    return [
        Row(f"{name}/{percent}", getattr(ours, percent), "ms", getattr(theirs, percent))
        for percent in ("p50", "p90", "p99")
    ]


def verdict(rows: Sequence[Row]) -> str:
    """A sentence on the figures that there is a goal for."""
    judged = [f"{name}/{percent}" for name in _JUDGED for percent in _JUDGED_PERCENTS]
    ratios = {row.name: row.ratio for row in rows if row.name in judged and row.ratio}
    if not ratios:
        return "nothing to compare: no answer had two tokens."
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    off = f"{abs(ratios[worst] - 1) * 100:.0f} %"
    holds = abs(ratios[worst] - 1) <= GOAL
    how = "holds" if holds else "does not hold"
    return f"within {GOAL * 100:.0f} % of real {how}: {worst} is off the most, by {off}."


def _for_real(
    model: PreparedModel,
    options: ServeOptions,
    workload: Workload,
    asked: ValidationAsk,
    on_progress: Progress,
) -> Sequence[Outcome]:
    serving = Serving(model, options)
    try:
        serving.start(on_progress)
        plan = Plan.of(Target(url=f"grpc://{serving.address}"), workload, asked.seed)
        result = run_load(plan, on_progress)
    except (ServeError, LoadError) as error:
        raise BenchError(str(error)) from error
    finally:
        serving.stop()
    if result.stopped:
        raise KeyboardInterrupt
    return result.outcomes


def _simulated(
    profile: DeviceProfile, options: ServeOptions, workload: Workload
) -> Sequence[Outcome]:
    setting = Setting(
        profile, local_prefill=options.local_prefill, itl_target_ms=options.itl_target_ms
    )
    try:
        return simulate(setting, workload).outcomes
    except SimulationError as error:
        raise BenchError(str(error)) from error


def _counted(outcomes: Sequence[Outcome], asked: ValidationAsk, how: str) -> Figures:
    """Without those of the warm-up."""
    found = figures([o for o in outcomes if o.ask.at_s >= asked.warm_up_s], _SLO)
    if found.failed:
        kinds = ", ".join(found.errors)
        raise BenchError(f"{how}: {found.failed} requests failed ({kinds}): lower --rate")
    if not found.requests:
        raise BenchError("no request is left after the warm-up: give it more --seconds")
    return found
