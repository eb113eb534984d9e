"""The highest rate at which a simulated cluster keeps its promise: `kvrelay simulate --find-rate`.

A few runs, by doubling and bisection.
"""

from collections.abc import Callable
from dataclasses import replace

from cluster.capacity.result import Result
from cluster.capacity.run import Setting
from cluster.preparation import Progress
from cluster.workload.asks import Workload
from cluster.workload.slo import Slo

ATTAINMENT = 0.9  # of requests
_CLOSE = 1.03  # the rate that is kept and the one that is not are so near in the end
_FIRST = 0.25  # requests/s of each worker, to begin with
_LEAST, _MOST = 1e-4, 1e4  # of each worker: beyond them there is no answer


def find_rate(
    setting: Setting,
    workload: Callable[[float], Workload],
    slo: Slo,
    on_progress: Progress,
    jobs: int = 1,
) -> Result:
    """The run at the highest rate that was found; the lowest tried where none is kept."""
    workers = setting.prefill + setting.decode
    tried: list[tuple[float, float]] = []

    def run(each: float) -> Result:
        on_progress(f"trying {each * workers:.4g} requests/s", None)
        result = Result.of(setting, workload(each * workers), slo, _silent, jobs)
        tried.append((each * workers, result.figures.attainment))
        return result

    best, low, high = _bracket(run)
    while best is not None and high / low > _CLOSE:
        middle = (low * high) ** 0.5
        result = run(middle)
        if result.figures.attainment >= ATTAINMENT:
            best, low = result, middle
        else:
            high = middle
    return replace(best or run(low), tried=tuple(tried))


def _bracket(run: Callable[[float], Result]) -> tuple[Result | None, float, float]:
    """A rate that is kept and its run, and one that is not: twice the other."""
    rate, best, failed = _FIRST, None, 0.0
    while _LEAST < rate < _MOST:
        result = run(rate)
        if result.figures.attainment >= ATTAINMENT:
            best = result
            if failed:
                return best, rate, failed
            rate *= 2
        else:
            if best is not None:
                return best, rate / 2, rate
            failed = rate
            rate /= 2
    return best, rate, rate


def _silent(stage: str, fraction: float | None) -> None:
    """One run of many."""
