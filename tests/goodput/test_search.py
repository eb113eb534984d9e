from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bench.goodput.search import Search


def found(search: Search, share_at) -> list[float]:
    rates = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        search.note(rate, share_at(rate))
    return rates


def falling(at: float):
    """0.9 of the requests are in time at this rate; fewer above it."""
    return lambda rate: max(0.0, min(1.0, 0.9 - 0.5 * (rate / at - 1)))


@pytest.mark.parametrize("first", [0.4, 1.0, 3.0, 9.0])
def test_it_finds_the_rate_at_which_the_share_falls_below_the_goal(first):
    search = Search(first, runs_max=12)
    found(search, falling(3.0))
    assert search.goodput == pytest.approx(3.0, rel=0.03)
    assert search.passed_at <= 3.0 < search.failed_at


def test_it_asks_for_the_first_rate_first_and_for_none_twice():
    rates = found(Search(2.0), falling(3.0))
    assert rates[0] == 2.0
    assert len(set(rates)) == len(rates)


def test_it_ends_after_so_many_runs():
    assert len(found(Search(1.0, runs_max=3), falling(100.0))) == 3


def test_where_no_rate_is_low_enough_there_is_no_goodput():
    search = Search(1.0, runs_max=50)
    rates = found(search, lambda rate: 0.5)
    assert (search.goodput, search.passed_at) == (0.0, None)
    assert len(rates) < 12
    assert min(rates) > 0.05


def test_where_all_rates_are_it_is_the_highest_that_was_tried():
    search = Search(1.0, runs_max=50)
    rates = found(search, lambda rate: 1.0)
    assert search.goodput == max(rates) < inf


def test_a_rate_that_passed_above_one_that_failed_does_not_count():
    search = Search(1.0)
    for rate, share in ((1.0, 0.95), (2.0, 0.8), (3.0, 0.95)):
        search.note(rate, share)
    assert search.passed_at == 1.0
    assert 1.0 < search.goodput < 2.0


def test_a_share_that_just_passes_is_where_the_goodput_is():
    search = Search(1.0)
    search.note(2.0, 0.9)
    search.note(2.2, 0.5)
    assert search.goodput == 2.0


@given(at=st.floats(0.1, 50), first=st.floats(0.5, 10), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_it_always_ends_within_what_was_measured(at, first, seed):
    search = Search(first, runs_max=8)
    rates = found(search, lambda rate: max(0.0, falling(at)(rate) - (hash((seed, rate)) % 7) / 100))
    assert 1 <= len(rates) <= 8
    assert 0 <= search.goodput <= max(rates)
