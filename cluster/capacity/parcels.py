"""Requests and outcomes on their way between the processes of `--jobs`, as plain rows.

Used by cells.py. Numbers in tuples, and one array of all gaps, are pickled several times as fast
as an object of a class, with an array of its own, for each request.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from cluster.workload.asks import Ask, Workload
from cluster.workload.outcomes import Outcome

_GAP: Final = "f"
_OF_ASK = attrgetter("at_s", "prompt_tokens", "answer_tokens", "prefix", "kind")
_OF_OUTCOME = (
    "sent_s",
    "first_token_s",
    "last_token_s",
    "tokens",
    "cached_tokens",
    "error",
    "queue_ms",
    "prefill_ms",
    "hand_off_ms",
)
_values_of = attrgetter(*_OF_OUTCOME)


@dataclass(frozen=True)
class WorkloadParcel:
    name: str
    block_tokens: int
    asks: list[tuple[float, int, int, tuple[int, ...], str]]

    @classmethod
    def of(cls, workload: Workload) -> "WorkloadParcel":
        return cls(workload.name, workload.block_tokens, list(map(_OF_ASK, workload.asks)))

    def open(self) -> Workload:
        return Workload(self.name, tuple(Ask(*ask) for ask in self.asks), self.block_tokens)


@dataclass(frozen=True)
class OutcomesParcel:
    """Of the asks of one workload. rows: the number of the ask, how many gaps, and what _OF_OUTCOME
    names; gaps: of all, one after another."""

    rows: list[tuple[Any, ...]]
    gaps: bytes

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], asks: Sequence[Ask]) -> "OutcomesParcel":
        """asks: the very objects that the outcomes are of."""
        numbers = {id(ask): number for number, ask in enumerate(asks)}
        rows, gaps = [], array(_GAP)
        for outcome in outcomes:
            gaps.extend(array(_GAP, outcome.gaps_s))  # some have none, of another type
            rows.append((numbers[id(outcome.ask)], len(outcome.gaps_s), *_values_of(outcome)))
        return cls(rows, gaps.tobytes())

    def open(self, asks: Sequence[Ask]) -> list[Outcome]:
        gaps = array(_GAP, self.gaps)
        outcomes, begin = [], 0
        for number, count, *values in self.rows:
            named = dict(zip(_OF_OUTCOME, values, strict=True))
            outcomes.append(Outcome(asks[number], gaps_s=gaps[begin : begin + count], **named))
            begin += count
        return outcomes
