"""Times of one request, SLOs, and the figures of many, beside numpy."""

import json
from array import array

import numpy as np
import pytest

from cluster.workload.asks import Ask, WorkloadError
from cluster.workload.figures import figures, quantiles
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo

SLO = Slo(ttft_ms=500, tpot_ms=100)


def answered(
    at_s: float, ttft_s: float, gaps_s: list[float], sent_s: float | None = None
) -> Outcome:
    first_s = at_s + ttft_s
    return Outcome(
        Ask(at_s, 100, 1 + len(gaps_s)),
        at_s if sent_s is None else sent_s,
        first_s,
        first_s + sum(gaps_s),
        1 + len(gaps_s),
        array("d", gaps_s),
    )


def failed(at_s: float, error: str) -> Outcome:
    return Outcome(Ask(at_s, 100, 3), at_s, error=error)


def test_times_count_from_when_the_request_was_due() -> None:
    outcome = answered(2.0, 0.4, [0.05, 0.15], sent_s=2.3)
    assert outcome.ttft_ms == pytest.approx(400)
    assert outcome.tpot_ms == pytest.approx(100)
    assert figures([outcome], SLO).lateness_ms.p50 == pytest.approx(300)


def test_who_meets_an_slo() -> None:
    assert SLO.met(answered(0, 0.4, [0.05, 0.14]))
    assert not SLO.met(answered(0, 0.6, [0.05]))
    assert not SLO.met(answered(0, 0.4, [0.05, 0.16]))
    assert SLO.met(answered(0, 0.4, []))  # one token
    assert not SLO.met(failed(0, "refused"))
    broken = answered(0, 0.1, [0.01])
    broken.error = "connection lost"
    assert not SLO.met(broken)


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (-1, 1), (float("nan"), 1), (1, float("inf"))])
def test_an_slo_has_to_be_above_0(wrong: tuple[float, float]) -> None:
    with pytest.raises(WorkloadError, match="must be above 0"):
        Slo(*wrong)


def test_quantiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(5).gamma(2.0, 30.0, 997)
    found = quantiles([*values, None])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx(np.percentile(values, [50, 90, 99]))
    assert found.mean == pytest.approx(values.mean())
    assert (found.most, found.count) == (values.max(), 997)
    assert quantiles([None]) is None


def test_a_failed_request_counts_against_attainment_and_goodput() -> None:
    outcomes = [answered(float(at), 0.2, [0.1] * 10) for at in range(6)]
    outcomes += [answered(6.0, 0.9, [0.1]), failed(7.0, "HTTP 500"), failed(8.0, "HTTP 500")]
    found = figures(outcomes, SLO)
    assert (found.requests, found.failed, found.errors) == (9, 2, {"HTTP 500": 2})
    assert found.offered_rps == pytest.approx(1.0)
    assert found.attainment == pytest.approx(6 / 9)
    assert found.goodput_rps == pytest.approx(6 / 9)
    assert found.seconds == 8.0  # to the last that was sent
    assert found.answered_rps == pytest.approx(7 / 8)
    assert found.output_tokens_per_s == pytest.approx((6 * 11 + 2) / 8)


def test_gaps_are_pooled_over_requests() -> None:
    outcomes = [answered(0, 0.1, [0.01] * 99), answered(1, 0.1, [1.0])]
    found = figures(outcomes, SLO)
    assert found.itl_ms.count == 100
    assert found.itl_ms.p50 == pytest.approx(10)
    assert found.tpot_ms.p50 == pytest.approx((10 + 1000) / 2)


def test_cached_tokens_phases_and_short_answers() -> None:
    one, other = answered(0, 0.1, [0.1]), answered(1, 0.1, [0.1])
    one.cached_tokens, one.queue_ms = 64, 5.0
    other.ask = Ask(1, 100, 7)
    found = figures([one, other], SLO)
    assert found.cached_share == pytest.approx(64 / 200)
    assert found.short == 1
    assert found.queue_ms.count == 1
    assert found.hand_off_ms is None


def test_nothing_was_asked() -> None:
    found = figures([], SLO)
    assert found.requests == 0
    assert found.ttft_ms is None
    assert json.loads(found.to_json())["goodput_rps"] == 0


def test_a_lone_request_has_the_rate_of_its_own_time() -> None:
    assert figures([answered(3.0, 0.25, [0.05] * 5)], SLO).offered_rps == pytest.approx(2.0)
