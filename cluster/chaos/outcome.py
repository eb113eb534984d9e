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
from cluster.chaos.excuses import AFTER_S, excused, router_losses, spans
from cluster.chaos.faults import KINDS, Strike
from cluster.chaos.goals import STALL_GOAL_S, STOP_GOAL_S, Goals
from cluster.chaos.leaks import Leaks
from cluster.chaos.load import percentile
from cluster.chaos.processes import ROLES
from cluster.chaos.samples import OURS, Growth
from cluster.chaos.streams import Stream, is_struck, stall_beyond_s, stall_s

_RIGHT = ("answered", "cancelled")
_WRONG = ("lost", "wrong", "repeated")
_SHOWN_MAX = 20  # failures that are told one by one
_NOTES = (
    "stall: the longest time in which a client got nothing: until its first token, between two, or"
    " until the end; of streams that ran between a fault and the end of its restart.",
    "stall-beyond: of that, what no fault excuses: a SIGKILL does until every process runs and"
    " every router is connected to all workers, a SIGSTOP for the 2 s that it may take to notice.",
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
    goals: Goals = field(default_factory=Goals)
    deaths: Sequence[str] = ()  # of processes that nobody struck, a line each

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
        yield from self._unexcused()
        yield from self._too_little()
        for strike in self.strikes:
            if strike.whole_s is None:
                yield f"the cluster was not whole again after {strike.kind} of {strike.pid}"
        yield from self.deaths
        yield from (text for text, met in self._goals() if not met)
        yield from (f"leaked: {what}" for what in self.leaks.found)
        yield from self._growth_failures()

    def _unexcused(self) -> Iterator[str]:
        """Only the loss of its router may break a client's stream."""
        losses = router_losses(self.strikes, self._end_s)
        for stream in self.streams:
            if (stream.asked_again or stream.resumed) and not is_struck(stream, losses):
                yield f"request {stream.number} lost its router, which nobody had struck"

    def _too_little(self) -> Iterator[str]:
        ended = sum(stream.outcome in _RIGHT for stream in self.streams)
        if ended < (least := self.goals.answers_min):
            yield f"only {ended} requests ended as they should, {least} at least: lower --rate"
        if len(self.strikes) < (least := self.goals.strikes_min):
            yield f"only {len(self.strikes)} faults were done, {least} at least: raise --minutes"

    def _growth_failures(self) -> Iterator[str]:
        for growth in self.growth:
            yield from growth.too_much
        known = Counter(growth.name for growth in self.growth)
        for name, count in self.goals.growths.items():
            if known[name] < count:
                yield f"growth is known of {known[name]} {name} processes only, {count} are due"

    def report(self) -> Report:
        failures = list(self.failures())
        notes = list(_NOTES) if self.strikes else []
        notes += [f"goal met: {text}" for text, met in self._goals() if met]
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
        for outcome in (*_RIGHT, *_WRONG):
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

    @property
    def _end_s(self) -> float:
        return max((stream.ended_s for stream in self.streams), default=0.0)

    def _struck(self, kind: str = "") -> list[Stream]:
        """Streams that ran at some time in the course of a fault whose kind begins so."""
        strikes = [strike for strike in self.strikes if strike.kind.startswith(kind)]
        met = spans(strikes, self._end_s, AFTER_S)
        return [stream for stream in self.streams if is_struck(stream, met)]

    def _stalls_beyond(self) -> list[float]:
        windows = {
            over: excused(self.strikes, self._end_s, over, self.goals.alone)
            for over in ("grpc", "http")
        }
        return sorted(
            stall_beyond_s(stream, windows[self._over(stream)]) for stream in self._struck()
        )

    def _stop_stalls(self) -> list[float]:
        """Whole silences of streams that met none but SIGSTOPs that others had to notice."""
        mild = [s for s in self.strikes if _is_noticed(s) and s.role not in self.goals.alone]
        other = spans([s for s in self.strikes if s not in mild], self._end_s, AFTER_S)
        met = spans(mild, self._end_s, AFTER_S)
        return sorted(
            stall_s(stream)
            for stream in self.streams
            if is_struck(stream, met)
            and not is_struck(stream, other)
            and self._over(stream) == "grpc"
        )

    def _over(self, stream: Stream) -> str:
        return str(self.asks[stream.ask].get("over", "grpc"))

    def _stall_rows(self) -> Iterator[Row]:
        if not self.strikes:
            longest = max((stall_s(stream) for stream in self.streams), default=0.0)
            yield Row("stall/max", longest, "s")
            return
        yield Row("stall/streams", len(self._struck()), "streams")
        yield from _percentiles("stall", [stall_s(stream) for stream in self._struck()], "s")
        yield from _percentiles("stall-beyond", self._stalls_beyond(), "s")
        yield from _percentiles("stall-stop", self._stop_stalls(), "s")

    def _goals(self) -> Iterator[tuple[str, bool]]:
        """What is to be, and whether it is."""
        if not self.strikes:
            return
        beyond = percentile(self._stalls_beyond(), 99)
        yield _goal("stall-beyond/p99", beyond, STALL_GOAL_S)
        if stops := self._stop_stalls():
            yield _goal("stall-stop/p99", percentile(stops, 99), STOP_GOAL_S)

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


def _is_noticed(strike: Strike) -> bool:
    """A process stood still and goes on: nothing had to be started again."""
    return strike.stops and strike.woken_s is not None


def _goal(name: str, value: float, most: float) -> tuple[str, bool]:
    return f"{name} is {value:.2f} s, {most:g} s at most", value <= most


def _percentiles(name: str, values: Sequence[float], unit: str) -> Iterator[Row]:
    if values:
        ordered = sorted(values)
        yield Row(f"{name}/p50", percentile(ordered, 50), unit)
        yield Row(f"{name}/p99", percentile(ordered, 99), unit)
        yield Row(f"{name}/max", ordered[-1], unit)
