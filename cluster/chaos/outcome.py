"""Owns what a run of `kvrelay chaos` came to: its figures, what was wrong, whether it passed.

run.py gathers an Outcome; the command prints it, page.py draws it. Pure.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from cluster.bench.report import Report, Row
from cluster.chaos.faults import KINDS, Strike, windows
from cluster.chaos.leaks import Leaks
from cluster.chaos.load import percentile
from cluster.chaos.processes import ROLES
from cluster.chaos.samples import OURS, Growth
from cluster.chaos.streams import Stream, Window, is_struck, stall_beyond_s, stall_s

STALL_GOAL_S = 3.0
_WRONG = ("lost", "wrong", "repeated")
_SHOWN_MAX = 20  # failures that are told one by one
_NOTES = (
    "stall: the longest time in which a client got nothing: until its first token, between two, or"
    " until the end; of streams that ran between a fault and the end of its restart.",
    "stall-beyond: of that, what lies outside of restarts, each from a fault until every process"
    " ran and every router was connected to all workers.",
    "asked-again: HTTP requests that lost their router; over gRPC the client resumes by itself.",
)


@dataclass(frozen=True)
class Moment:
    """What was seen at `at_s`: since the start, `tokens` of all answers and requests `ended`."""

    at_s: float
    tokens: int
    running: int
    ended: int
    alive: Mapping[str, int]


@dataclass
class Outcome:
    """All that was seen."""

    machine: Mapping[str, Any]
    again: str = ""  # the command that runs it once more
    asks: Sequence[Mapping[str, Any]] = ()
    streams: Sequence[Stream] = ()
    itl_ms: tuple[float, float] = (0.0, 0.0)  # 50th and 99th percentile
    strikes: Sequence[Strike] = ()
    moments: list[Moment] = field(default_factory=list)
    leaks: Leaks = field(default_factory=Leaks)
    growth: Sequence[Growth] = ()

    @property
    def passed(self) -> bool:
        return not any(self.failures())

    def failures(self) -> Iterator[str]:
        """A line for each thing that is not as promised."""
        for stream in self.streams:
            if stream.outcome in _WRONG:
                kind = self.asks[stream.ask]["kind"]
                yield (
                    f"request {stream.number} (ask {stream.ask}, {kind}) {stream.outcome}:"
                    f" {stream.trouble}"
                )
        for strike in self.strikes:
            if strike.whole_s is None:
                yield f"the cluster was not whole again after {strike.kind} of {strike.pid}"
        yield from (f"leaked: {what}" for what in self.leaks.found)
        for growth in self.growth:
            yield from growth.too_much

    def report(self) -> Report:
        failures = list(self.failures())
        notes = [*(_NOTES if self.strikes else ()), *self._goal_met()]
        notes += failures[:_SHOWN_MAX]
        if len(failures) > _SHOWN_MAX:
            notes.append(f"and {len(failures) - _SHOWN_MAX} more")
        return Report(self.machine, list(self._rows()), notes)

    def to_json(self) -> str:
        """The report's object with what else a program may want to know."""
        failed = {s.ask for s in self.streams if s.outcome in _WRONG}
        more = {
            "passed": self.passed,
            "again": self.again,
            "failures": list(self.failures()),
            "failed_asks": [self.asks[number] for number in sorted(failed)],
            "faults": [asdict(strike) for strike in self.strikes],
            "growth": [asdict(growth) for growth in self.growth],
            "blocks": self.leaks.blocks,
        }
        return json.dumps({**json.loads(self.report().to_json()), **more}, allow_nan=False)

    # ---- figures

    def _rows(self) -> Iterator[Row]:
        kinds: Counter[str] = Counter(stream.outcome for stream in self.streams)
        yield Row("requests/asked", len(self.streams), "requests")
        for outcome in ("answered", "cancelled", *_WRONG):
            yield Row(f"requests/{outcome}", kinds[outcome], "requests")
        for name in ("resumed", "asked_again", "refused"):
            count = sum(getattr(stream, name) for stream in self.streams)
            yield Row(f"requests/{name.replace('_', '-')}", count, "times")
        yield Row("tokens/streamed", sum(stream.tokens for stream in self.streams), "tokens")
        first_ms = [1000 * (s.first_s - s.asked_s) for s in self.streams if s.first_s is not None]
        yield from _percentiles("ttft", first_ms, "ms")
        for percent, value in zip((50, 99), self.itl_ms, strict=True):
            yield Row(f"itl/p{percent}", value, "ms")
        yield from self._stall_rows()
        yield from self._fault_rows()
        yield Row("leaked/blocks", sum(self.leaks.blocks.values()), "blocks")
        yield from self._growth_rows()

    def _restarts(self) -> list[Window]:
        return windows(self.strikes, max((s.ended_s for s in self.streams), default=0.0))

    def _struck(self) -> list[Stream]:
        restarts = self._restarts()
        return [stream for stream in self.streams if is_struck(stream, restarts)]

    def _stalls_beyond(self) -> list[float]:
        restarts = self._restarts()
        return sorted(stall_beyond_s(stream, restarts) for stream in self._struck())

    def _stall_rows(self) -> Iterator[Row]:
        if not self.strikes:
            longest = max((stall_s(stream) for stream in self.streams), default=0.0)
            yield Row("stall/max", longest, "s")
            return
        yield Row("stall/streams", len(self._struck()), "streams")
        yield from _percentiles("stall", [stall_s(stream) for stream in self._struck()], "s")
        yield from _percentiles("stall-beyond", self._stalls_beyond(), "s")

    def _goal_met(self) -> Iterator[str]:
        if not self.strikes:
            return
        value = percentile(self._stalls_beyond(), 99)
        met = "met" if value <= STALL_GOAL_S else "missed"
        yield f"goal {met}: stall-beyond/p99 {value:.2f} s, {STALL_GOAL_S:g} s at most."

    def _fault_rows(self) -> Iterator[Row]:
        counts = Counter(strike.kind for strike in self.strikes)
        yield from (Row(f"faults/{kind}", counts[kind], "times") for kind in KINDS if counts[kind])
        for role in ROLES:
            kills = [s.restart_s for s in self.strikes if s.kind == f"kill-{role}"]
            times_s = [seconds for seconds in kills if seconds is not None]
            if times_s:
                yield Row(f"restart/{role}-p50", median(times_s), "s")
                yield Row(f"restart/{role}-max", max(times_s), "s")

    def _growth_rows(self) -> Iterator[Row]:
        for growth in self.growth:
            if growth.name in OURS:
                for kind, value in growth.per_minute.items():
                    yield Row(f"growth/{growth.name}-{growth.pid}-{kind}", value, f"{kind}/min")


def _percentiles(name: str, values: Sequence[float], unit: str) -> Iterator[Row]:
    if values:
        ordered = sorted(values)
        yield Row(f"{name}/p50", percentile(ordered, 50), unit)
        yield Row(f"{name}/p99", percentile(ordered, 99), unit)
        yield Row(f"{name}/max", ordered[-1], unit)
