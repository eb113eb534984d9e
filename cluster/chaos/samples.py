"""Owns how much memory and how many descriptors and threads each process has over time, and whether
that grows.

Made by run.py, which calls `take` every few seconds. `growth_per_minute` is pure.
"""

import contextlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from statistics import median

import psutil

from cluster.chaos.processes import ROLES

OURS = frozenset({*ROLES, "serving"})  # the others are Ray's own
KINDS = ("MB", "fds", "threads")
MB_GOAL = 0.2  # growth a minute, at most
STEPS_GOAL = 2.0  # more fds or threads at the end, at most: some are made when first needed
STEPS_SHORT_GOAL = 8.0  # of a short time, in which more of them are, and with faults
FIT_S_MIN = 180.0  # a shorter time after the warm-up says nothing of memory
POINTS_MIN = 5
_MB = 1e6


@dataclass
class Series:
    """What one process had, at `at_s`."""

    name: str
    pid: int
    at_s: "array[float]" = field(default_factory=lambda: array("d"))
    values: "dict[str, array[float]]" = field(
        default_factory=lambda: {kind: array("d") for kind in KINDS}
    )


@dataclass(frozen=True)
class Growth:
    """Of one process, a minute, after the warm-up; `last` is what it had at the end. `minutes` 0:
    there were too few samples."""

    name: str
    pid: int
    per_minute: Mapping[str, float]
    last: Mapping[str, float]
    minutes: float
    of_memory: bool = True  # it is judged; not where faults make others do more

    @property
    def too_much(self) -> list[str]:
        """What grew beyond its goal, or is not known. Of Ray's own processes nothing."""
        if self.name not in OURS:
            return []
        if not self.minutes:
            return [f"growth of {self.name} {self.pid} is not known: there were too few samples"]
        steady = self.of_memory and self.minutes * 60 >= FIT_S_MIN
        steps = (STEPS_GOAL if steady else STEPS_SHORT_GOAL) / self.minutes
        goals = {"fds": steps, "threads": steps} | ({"MB": MB_GOAL} if steady else {})
        return [
            f"{self.name} {self.pid} grows by {value:.2f} {kind}/min, {goals[kind]:.2g} at most"
            for kind, value in self.per_minute.items()
            if value > goals.get(kind, inf)
        ]


class Samples:
    def __init__(self) -> None:
        self.series: dict[int, Series] = {}

    def take(self, names: Mapping[int, str], now_s: float) -> None:
        """One sample of each of these processes."""
        for pid, name in names.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                # What is its own: mapped weights and kernels are shared.
                memory_mb = process.memory_full_info().uss / _MB
                values = {
                    "MB": memory_mb,
                    "fds": float(process.num_fds()),
                    "threads": float(process.num_threads()),
                }
                series = self.series.setdefault(pid, Series(name, pid))
                series.at_s.append(now_s)
                for kind, value in values.items():
                    series.values[kind].append(value)

    def growth(self, since_s: float, *, of_memory: bool = True) -> list[Growth]:
        """Of all processes that were there from `since_s` to the end."""
        end_s = max((series.at_s[-1] for series in self.series.values()), default=0.0)
        return [
            _growth(series, since_s, of_memory)
            for series in sorted(self.series.values(), key=lambda each: (each.name, each.pid))
            if series.at_s[0] <= since_s and series.at_s[-1] == end_s
        ]


def _growth(series: Series, since_s: float, of_memory: bool) -> Growth:
    first = next(at for at, taken_s in enumerate(series.at_s) if taken_s >= since_s)
    at_s = series.at_s[first:]
    minutes = (at_s[-1] - at_s[0]) / 60 if len(at_s) >= POINTS_MIN else 0.0
    slopes = {
        kind: growth_per_minute(at_s, values[first:]) for kind, values in series.values.items()
    }
    last = {kind: values[-1] for kind, values in series.values.items()}
    return Growth(series.name, series.pid, slopes, last, minutes, of_memory)


def growth_per_minute(at_s: Sequence[float], values: Sequence[float]) -> float:
    """The median slope between any two points (Theil and Sen): a few that lie apart, the garbage
    collector's for one, change nothing. 0 for too few points."""
    if len(at_s) < POINTS_MIN:
        return 0.0
    points = list(zip(at_s, values, strict=True))
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2) if t > s]
    return 60 * median(slopes) if slopes else 0.0
