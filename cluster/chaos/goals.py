"""Owns how much a run of `kvrelay chaos` has to have done before it can pass. Pure.

Made by run.py, judged by outcome.py: a run without load or without faults shows nothing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

STALL_GOAL_S = 3.0  # 99th percentile, beyond what is excused
STOP_GOAL_S = 5.0  # 99th percentile, whole: 2 s to notice, and the 3 s above
_CHAOS_SHARE = 0.25  # of the requests that are due: those that wait for a restart hold others up
_SOAK_SHARE = 5 / 6  # 20,000 of the 24,000 of 20 minutes
_SOAK_SHORT_SHARE = 0.5  # of few clumps none knows how many come
_SOAK_SHORT = 10_000
_STRIKE_S_MIN = 10.0  # the shortest time in which a fault and its restart follow the one before
_STRIKE_SHARE = 0.5


@dataclass(frozen=True)
class Goals:
    """At least so many requests have to end as they should, so many faults to be done, and of so
    many processes of each role growth has to be known. `alone`: roles with one process."""

    answers_min: int = 1
    strikes_min: int = 0
    growths: Mapping[str, int] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()


def goals(
    *,
    seconds: float,
    rate: float,
    kill_every_s: float,
    soak: bool,
    counts: Mapping[str, int],
    struck: Collection[str] = (),
) -> Goals:
    """What a run of these settings owes. `counts`: processes of each role; `struck`: roles that
    faults meet, of which growth says nothing."""
    due = seconds * rate
    share = _CHAOS_SHARE
    if soak and not kill_every_s:
        share = _SOAK_SHARE if due >= _SOAK_SHORT else _SOAK_SHORT_SHARE
    growths = {role: count for role, count in counts.items() if role not in struck}
    if soak and not kill_every_s:  # with faults this one starts others again and again
        growths["serving"] = 1
    strikes = seconds * _STRIKE_SHARE / max(kill_every_s, _STRIKE_S_MIN)
    return Goals(
        answers_min=max(1, int(due * share)),
        strikes_min=max(1, int(strikes)) if kill_every_s else 0,
        growths=growths,
        alone=frozenset(role for role, count in counts.items() if count == 1),
    )
