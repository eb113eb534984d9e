"""`kvrelay bench goodput`: starts one arrangement after another and searches its goodput.

Called by commands.py. For each SLO every arrangement gets a cluster of its own, set up for that
SLO, and the same requests at the same times. The order of the arrangements turns round from one SLO
to the next, so that a machine that grows slower does so for all.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bench.goodput.arrangements import ARRANGEMENTS, COLOCATED, DISAGGREGATED, Arrangement
from cluster.bench.goodput.result import Cell, Goodput, Tried
from cluster.bench.goodput.scale import Point, Unloaded, points
from cluster.bench.goodput.search import Search
from cluster.bench.goodput.unloaded import measure_unloaded
from cluster.bench.machine import QuietLooks, cores_usable, describe_machine, unrest
from cluster.bench.report import BenchError
from cluster.load.plan import LATE_MS_MAX, LoadError, Plan, Target
from cluster.load.run import run_load
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.serving import Serving
from cluster.weights import pack_weights
from cluster.workload.mixes import Range, make_mix
from cluster.workload.slo import Slo
from cluster.workload.traces import scaled
from kvrelay.cache import default_cache
from kvrelay.config import Quantize

_SEED = 7
_WARM_UP_REQUESTS = 12  # of each cluster, at the first rate, so that its workers know their costs
_AT_ONCE = 2  # requests: a first guess at the goodput
_FAILED_MAX = 0.5  # of a run's requests: more say that something else is wrong


@dataclass(frozen=True)
class GoodputBench:
    """What is measured. goal: the share of requests that have to meet the SLO; requests: of each
    run; precision and runs_max: those of the search."""

    tpot_scale: Sequence[float]
    ttft_scale: Sequence[float]
    fixed: Sequence[Slo]
    prompt: Range
    answer: Range
    quantize: Quantize
    requests: int
    goal: float = 0.9
    precision: float = 0.05
    runs_max: int = 6
    arrangements: Sequence[Arrangement] = field(default=ARRANGEMENTS)


class StoppedError(BenchError):
    """Somebody has pressed Ctrl-C."""


def bench_goodput(model: PreparedModel, asked: GoodputBench, on_progress: Progress) -> Goodput:
    """After Ctrl-C what there is until then. Raises BenchError when the model cannot be served, or
    nothing has been found yet."""
    others = QuietLooks()
    pack_weights(model.path, asked.quantize, default_cache(), on_progress)
    bench = _Bench(model, asked, others, on_progress)
    unloaded = bench.unloaded()
    unit = Unloaded.slowest(list(unloaded.values()))
    todo = points(unit, asked.tpot_scale, asked.ttft_scale, asked.fixed)
    cells: dict[Point, dict[str, Cell]] = {}
    stopped = []
    try:
        for number, point in enumerate(todo):
            turn = asked.arrangements if number % 2 == 0 else tuple(reversed(asked.arrangements))
            bench.share_done = number / len(todo)
            found = cells.setdefault(point, {})
            for one in turn:
                found[one.name] = bench.cell(one, point)
    except (StoppedError, KeyboardInterrupt):
        if not any(cells.values()):
            raise
        stopped = ["stopped before it was done: what is missing was not measured"]
    busy = others.cores_busy()
    machine = {
        **describe_machine(cores_usable()),
        "model": model.name,
        "quantize": asked.quantize,
        "prompts": f"{asked.prompt[0]}-{asked.prompt[1]} tokens",
        "answers": f"{asked.answer[0]}-{asked.answer[1]} tokens",
        "requests": asked.requests,
        "goal": asked.goal,
        "others busy": busy,
    }
    notes = (*stopped, *_notes(unloaded, unit, asked.goal), *_late(cells), *unrest(busy))
    return Goodput(machine, unit, unloaded, todo, cells, notes)


class _Bench:
    def __init__(
        self, model: PreparedModel, asked: GoodputBench, others: QuietLooks, on_progress: Progress
    ) -> None:
        self.share_done = 0.0
        self._model = model
        self._asked = asked
        self._others = others
        self._on_progress = on_progress
        self._cores = cores_usable()
        self._last: dict[str, float] = {}  # goodput of each arrangement: where it is searched next
        self._runs = 0

    def unloaded(self) -> dict[str, Unloaded]:
        """Of the arrangements that compute prompts in different ways when nothing else runs."""
        asked = self._asked
        found = {}
        for one in asked.arrangements:
            if one.name not in (COLOCATED, DISAGGREGATED):
                continue
            with self._serving(one.options(asked.quantize, self._cores)) as serving:
                alone = measure_unloaded(
                    serving.address, asked.prompt, asked.answer, self._on_progress
                )
            found[one.name] = alone
            took_ms = alone.ttft_ms + sum(asked.answer) / 2 * alone.tpot_ms
            self._last[one.name] = 1000 * _AT_ONCE / took_ms
        return found

    def cell(self, arrangement: Arrangement, point: Point) -> Cell:
        asked = self._asked
        first_rate = self._last.get(arrangement.name) or max(self._last.values())
        search = Search(
            first_rate, goal=asked.goal, precision=asked.precision, runs_max=asked.runs_max
        )
        tried = []
        with self._serving(arrangement.options(asked.quantize, self._cores, point.slo)) as serving:
            self._load(serving, first_rate, _WARM_UP_REQUESTS, point.slo)
            while (rate := search.next_rate()) is not None:
                what = f"{arrangement.name}, {point.name}: {rate:.2f} requests/s"
                self._on_progress(what, self.share_done)
                seen = self._load(serving, rate, asked.requests, point.slo)
                self._on_progress(f"{what}: {seen.attainment:.0%} met it", self.share_done)
                search.note(rate, seen.attainment)
                tried.append(seen)
        # A point without goodput says little of where that of the next one is.
        self._last[arrangement.name] = search.goodput or first_rate
        return Cell(search.goodput, search.passed_at or 0.0, tried)

    def _load(self, serving: Serving, rate: float, requests: int, slo: Slo) -> Tried:
        """The same requests at whatever rate; their tokens are others in each run."""
        asked = self._asked
        self._runs += 1
        drawn = make_mix(
            "uniform",
            rate,
            None,
            _SEED,
            requests=requests,
            prompt=asked.prompt,
            answer=asked.answer,
        )
        workload = scaled(drawn, requests_per_s=rate)  # a hundred draws are off by a tenth
        target = Target(url=f"grpc://{serving.address}")
        plan = Plan.of(target, workload, _SEED, prompts_seed=self._runs)
        try:
            result = run_load(plan)
        except LoadError as error:
            raise BenchError(str(error)) from error
        if result.stopped:
            raise StoppedError("stopped before it was done")
        tried = Tried.of(rate, result, slo)
        if tried.failed > _FAILED_MAX * requests:
            raise BenchError(f"{tried.failed} of {requests} requests failed: {result.told}")
        return tried

    @contextlib.contextmanager
    def _serving(self, options: ServeOptions) -> Iterator[Serving]:
        self._others.look()
        serving = Serving(self._model, options)
        try:
            serving.start(self._on_progress)
            yield serving
        except ServeError as error:
            raise BenchError(str(error)) from error
        finally:
            serving.stop()


def _notes(unloaded: Mapping[str, Unloaded], unit: Unloaded, goal: float) -> list[str]:
    alone = "; ".join(
        f"{name} {one.ttft_ms:.0f} and {one.tpot_ms:.1f} ms" for name, one in unloaded.items()
    )
    return [
        f"1x is TTFT {unit.ttft_ms:.0f} ms and TPOT {unit.tpot_ms:.1f} ms: of requests that are"
        f" alone, in the middle, of the slower arrangement ({alone}).",
        f"goodput: requests/s at which {goal * 100:.0f} % meet both, between the highest rate that"
        " was run and met them and the next that did not. ITL: at that highest rate.",
    ]


def _late(cells: Mapping[Point, Mapping[str, Cell]]) -> list[str]:
    """Whether the load generator kept up."""
    runs = [one for by_name in cells.values() for cell in by_name.values() for one in cell.tried]
    late = sum(one.late_ms > LATE_MS_MAX for one in runs)
    if not late:
        return []
    return [
        f"in {late} of {len(runs)} runs the load generator sent requests, or read answers, late"
        f" (p99 over {LATE_MS_MAX:g} ms)"
    ]
