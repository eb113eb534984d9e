"""Figures of many requests: what a workload's outcomes say of whoever answered them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cluster.workload.asks import own_rate
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds, linear between neighbours; `count` values are behind them."""

    p50: float
    p90: float
    p99: float
    mean: float
    most: float
    count: int


@dataclass(frozen=True)
class Figures:
    """Quantiles are None where there is nothing to take them of.

    Rates of what was done are over `seconds`, from the first request's due time to the last
    token. `attainment` is the share of requests that met the SLO, failed ones among those that
    did not, and `goodput_rps` that share of the rate they were asked at.
    """

    requests: int
    failed: int
    errors: Mapping[str, int]  # failed requests by what went wrong
    short: int  # answers with fewer tokens than asked for
    seconds: float
    offered_rps: float
    answered_rps: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    slo: Slo
    attainment: float
    goodput_rps: float
    cached_share: float  # of the prompt tokens of requests that were answered
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    itl_ms: Quantiles | None
    lateness_ms: Quantiles | None  # of sending: the load generator's own
    queue_ms: Quantiles | None
    prefill_ms: Quantiles | None
    hand_off_ms: Quantiles | None

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self), allow_nan=False)


def figures(outcomes: Sequence[Outcome], slo: Slo) -> Figures:
    """Of any number of them, in any order."""
    answered = [outcome for outcome in outcomes if outcome.ended]
    failed = [outcome for outcome in outcomes if not outcome.ended]
    asks = sorted((outcome.ask for outcome in outcomes), key=lambda ask: ask.at_s)
    seconds = _seconds(outcomes)
    # A lone request, and requests that are due at once, have no rate of their own.
    offered_rps = own_rate(asks) or _rate(len(asks), seconds)
    attainment = _share(sum(map(slo.met, outcomes)), len(outcomes))
    prompt_tokens = sum(outcome.ask.prompt_tokens for outcome in answered)
    return Figures(
        requests=len(outcomes),
        failed=len(failed),
        errors=dict(Counter(outcome.error or "no answer" for outcome in failed).most_common()),
        short=sum(outcome.tokens < outcome.ask.answer_tokens for outcome in answered),
        seconds=seconds,
        offered_rps=offered_rps,
        answered_rps=_rate(len(answered), seconds),
        output_tokens_per_s=_rate(sum(outcome.tokens for outcome in outcomes), seconds),
        prompt_tokens_per_s=_rate(prompt_tokens, seconds),
        slo=slo,
        attainment=attainment,
        goodput_rps=attainment * offered_rps,
        cached_share=_share(sum(outcome.cached_tokens for outcome in answered), prompt_tokens),
        ttft_ms=quantiles(outcome.ttft_ms for outcome in answered),
        tpot_ms=quantiles(outcome.tpot_ms for outcome in answered),
        itl_ms=_of_array(gaps_ms(answered)),
        lateness_ms=quantiles(
            max(0.0, outcome.sent_s - outcome.ask.at_s) * 1000 for outcome in outcomes
        ),
        queue_ms=quantiles(outcome.queue_ms for outcome in answered),
        prefill_ms=quantiles(outcome.prefill_ms for outcome in answered),
        hand_off_ms=quantiles(outcome.hand_off_ms for outcome in answered),
    )


def quantiles(values: Iterable[float | None]) -> Quantiles | None:
    """Of those that are not None."""
    return _of_array(np.fromiter((value for value in values if value is not None), np.float64))


def gaps_ms(outcomes: Iterable[Outcome]) -> np.ndarray:
    """[gaps] between the tokens of all of them, in milliseconds."""
    parts = [np.asarray(outcome.gaps_s, np.float64) for outcome in outcomes]
    return np.concatenate(parts) * 1000 if parts else np.empty(0)


def _of_array(values: np.ndarray) -> Quantiles | None:
    if not values.size:
        return None
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99)).tolist()
    return Quantiles(p50, p90, p99, float(values.mean()), float(values.max()), values.size)


def _seconds(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    ends = (outcome.last_token_s for outcome in outcomes)
    first_due_s = min(outcome.ask.at_s for outcome in outcomes)
    last_s = max((end for end in ends if end is not None), default=first_due_s)
    return max(last_s, max(outcome.sent_s for outcome in outcomes)) - first_due_s


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
