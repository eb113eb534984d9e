"""What one run of load brought: outcomes, and how far the generator itself can be believed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.load.plan import LATE_MS_MAX, ask_fields, ask_from
from cluster.load.targets import Server
from cluster.workload.figures import Figures, figures
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo


@dataclass(frozen=True)
class LoopLateness:
    """How late the generator's event loop woke who slept, in milliseconds."""

    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class LoadResult:
    """`told`: what the server said of the first failure of each kind. unfinished: requests that
    ran when the load was stopped, which are in no figure. held: requests that waited for one of
    the `connections_max` connections."""

    url: str
    workload: str
    seed: int
    server: Server
    outcomes: Sequence[Outcome]
    loop: LoopLateness = LoopLateness()
    planned: int = 0
    unfinished: int = 0
    held: int = 0
    connections_max: int = 0
    stopped: bool = False
    told: Mapping[str, str] = field(default_factory=dict)

    def figures(self, slo: Slo) -> Figures:
        return figures(self.outcomes, slo)

    def warnings(self, found: Figures) -> tuple[str, ...]:
        """Sentences on why the figures are not what they seem."""
        late = found.lateness_ms
        warnings = []
        if self.held:
            warnings.append(
                f"{self.held} requests were sent late, for {self.connections_max} ran already."
            )
        if late and late.p99 > LATE_MS_MAX:
            warnings.append(
                f"Requests were sent late: p99 {late.p99:.0f} ms, at most {late.most:.0f} ms. TTFT "
                "counts from when they were due; run fewer, or the load on a machine of its own."
            )
        if self.loop.p99 > LATE_MS_MAX:
            warnings.append(
                f"The load generator was slow: its loop woke late by p99 {self.loop.p99:.0f} ms, "
                f"at most {self.loop.most:.0f} ms, and read answers as late."
            )
        return tuple(warnings)

    def notes(self, found: Figures) -> tuple[str, ...]:
        """Sentences for people: how to read the figures."""
        notes = list(self.server.notes)
        if too_long := sum(self.server.is_too_long(outcome.ask) for outcome in self.outcomes):
            notes.append(
                f"{too_long} requests were for more than the {self.server.tokens_max:,} tokens, "
                "prompt and answer, that the model takes: --length-scale makes them shorter."
            )
        if self.stopped:
            notes.append(
                f"Stopped: {found.requests} of {self.planned} requests are in the figures; "
                f"{self.unfinished} that ran are not."
            )
        if found.short:
            notes.append(f"{found.short} answers were shorter than asked for.")
        notes += [
            f"{count} requests failed with {kind}: {self.told.get(kind, 'no more is known')}"
            for kind, count in found.errors.items()
        ]
        return tuple(notes)

    def to_json(self, slo: Slo) -> str:
        """One object, with every request."""
        found = self.figures(slo)
        return json.dumps(
            {
                "url": self.url,
                "server": asdict(self.server),
                "workload": self.workload,
                "seed": self.seed,
                "stopped": self.stopped,
                "planned": self.planned,
                "unfinished": self.unfinished,
                "held": self.held,
                "loop_late_ms": asdict(self.loop),
                "warnings": self.warnings(found),
                "notes": self.notes(found),
                "figures": asdict(found),
                "requests": [_request(outcome, slo) for outcome in self.outcomes],
            },
            allow_nan=False,
        )


def _request(outcome: Outcome, slo: Slo) -> dict[str, Any]:
    ask = outcome.ask
    return {
        "at_s": ask.at_s,
        "kind": ask.kind,
        "prompt_tokens": ask.prompt_tokens,
        "answer_tokens": ask.answer_tokens,
        "sent_s": outcome.sent_s,
        "first_token_s": outcome.first_token_s,
        "last_token_s": outcome.last_token_s,
        "tokens": outcome.tokens,
        "cached_tokens": outcome.cached_tokens,
        "ttft_ms": outcome.ttft_ms,
        "tpot_ms": outcome.tpot_ms,
        "queue_ms": outcome.queue_ms,
        "prefill_ms": outcome.prefill_ms,
        "hand_off_ms": outcome.hand_off_ms,
        "error": outcome.error,
        "met_slo": slo.met(outcome),
    }


# ---- between the processes


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """As JSON has it."""
    fields = {name: getattr(outcome, name) for name in Outcome.__slots__}
    return {**fields, "ask": ask_fields(outcome.ask), "gaps_s": list(outcome.gaps_s)}


def outcome_from(fields: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**fields, "ask": ask_from(fields["ask"])})
