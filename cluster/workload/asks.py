"""Requests and when they are due. Made by traces.py and mixes.py; asked by load/ and capacity/."""

from collections.abc import Sequence
from dataclasses import dataclass


class WorkloadError(Exception):
    """No workload can be made of this; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `at_s` counts from the workload's beginning.

    `prefix` names the prompt's leading blocks: equal ids stand for equal tokens. The last one may
    be of a block that the prompt does not fill, and the tokens beyond it are the request's own.
    """

    at_s: float
    prompt_tokens: int
    answer_tokens: int  # asked with ignore_eos, so that exactly so many come
    prefix: tuple[int, ...] = ()
    kind: str = ""  # of a mix: "chat", "code"


@dataclass(frozen=True)
class Workload:
    """`asks` are in the order of their times; one id of a prefix stands for `block_tokens`."""

    name: str
    asks: tuple[Ask, ...]
    block_tokens: int = 512


def own_rate(asks: Sequence[Ask]) -> float | None:
    """Requests a second, of the gaps between asks in order; None where there are none."""
    span_s = asks[-1].at_s - asks[0].at_s if asks else 0.0
    return (len(asks) - 1) / span_s if span_s > 0 else None
