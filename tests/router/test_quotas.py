"""Quotas: what is let in, when there is room again, and that all comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.quotas import UNLIMITED, BeyondQuotaError, Quota, QuotaExceededError, Quotas


def enter(quotas: Quotas, quota: Quota, now: float, name: str = "alice"):
    return quotas.enter(name, quota, now)


def exceeded(action, *args) -> QuotaExceededError:
    with pytest.raises(QuotaExceededError) as caught:
        action(*args)
    return caught.value


def test_without_quotas_nothing_is_counted():
    quotas = Quotas()
    for now in range(1000):
        quotas.reserve(enter(quotas, UNLIMITED, 0), 1 << 20, 1 << 20, now)
    assert quotas._accounts == {}


def test_requests_a_minute_come_in_a_burst_and_then_evenly():
    quotas, quota = Quotas(), Quota(requests_per_minute=6)  # one in 10 s
    for _ in range(6):
        quotas.end(enter(quotas, quota, 0), 0, 0)
    assert exceeded(enter, quotas, quota, 0).retry_ms == 10_000
    error = exceeded(enter, quotas, quota, 4_000)
    assert error.retry_ms == 6_000
    assert str(error) == "the quota of this API key, 6 requests a minute, is used up"
    enter(quotas, quota, 4_000 + error.retry_ms)
    assert exceeded(enter, quotas, quota, 10_000).retry_ms == 10_000
    for _ in range(6):  # never more than a minute's
        enter(quotas, quota, 1e9)
    exceeded(enter, quotas, quota, 1e9)


def test_requests_at_once():
    quotas, quota = Quotas(), Quota(requests_at_once=2)
    one, _ = enter(quotas, quota, 0), enter(quotas, quota, 0)
    assert exceeded(enter, quotas, quota, 1e9).retry_ms is None
    quotas.end(one, 0, 0)
    quotas.end(one, 0, 0)  # changes nothing
    enter(quotas, quota, 0)
    exceeded(enter, quotas, quota, 0)


def test_a_request_that_is_refused_is_not_counted():
    quotas, quota = Quotas(), Quota(requests_at_once=1, requests_per_minute=2)
    lease = enter(quotas, quota, 0)
    for _ in range(9):
        exceeded(enter, quotas, quota, 0)
    quotas.end(lease, 0, 0)
    enter(quotas, quota, 0)


def test_tokens_a_minute_are_reserved_and_what_is_left_comes_back():
    quotas, quota = Quotas(), Quota(tokens_per_minute=600)  # 1 in 100 ms
    lease = enter(quotas, quota, 0)
    quotas.reserve(lease, 100, 400, 0)
    other = enter(quotas, quota, 0)
    assert exceeded(quotas.reserve, other, 100, 50, 0).retry_ms == 5_000
    quotas.reserve(other, 100, 50, 5_000)
    assert exceeded(enter, quotas, quota, 5_000).retry_ms == 100
    quotas.end(lease, 150, 5_000)  # 350 of the 500 come back
    third = enter(quotas, quota, 5_000)
    assert exceeded(quotas.reserve, third, 1, 350, 5_000).retry_ms == 100
    quotas.reserve(third, 1, 349, 5_000)


def test_tokens_held_at_once():
    quotas, quota = Quotas(), Quota(kv_tokens_at_once=100)
    lease = enter(quotas, quota, 0)
    quotas.reserve(lease, 50, 40, 0)
    other = enter(quotas, quota, 0)
    error = exceeded(quotas.reserve, other, 6, 5, 1e9)
    assert error.retry_ms is None
    assert "hold 90 tokens, this one needs 11, its quota is 100" in str(error)
    quotas.end(lease, 90, 0)
    quotas.reserve(other, 6, 5, 0)


@pytest.mark.parametrize("limit", ["tokens_per_minute", "kv_tokens_at_once"])
def test_a_request_that_never_fits_is_told_so(limit):
    quotas = Quotas()
    lease = enter(quotas, Quota(**{limit: 100}), 0)
    with pytest.raises(BeyondQuotaError, match=r"60 prompt tokens and max_tokens 41 .* 100"):
        quotas.reserve(lease, 60, 41, 0)
    quotas.reserve(lease, 60, 40, 0)


def test_what_goes_on_is_counted_though_there_is_no_room_for_it():
    """A request that another router has let in must not be lost for want of quota."""
    quotas = Quotas()
    quota = Quota(
        requests_per_minute=1, requests_at_once=1, tokens_per_minute=60, kv_tokens_at_once=100
    )
    quotas.end(quotas.go_on("alice", quota, 0, 0), 0, 0)
    running = enter(quotas, quota, 0)  # the minute's only one
    quotas.look("alice", quota, 0)
    quotas.looked("alice", quota, found=True)
    lease = quotas.go_on("alice", quota, 120, 0)
    quotas.end(running, 0, 0)
    assert "1 requests of this API key are running" in str(exceeded(enter, quotas, quota, 1e9))
    quota = Quota(tokens_per_minute=60, kv_tokens_at_once=100)
    error = exceeded(enter, quotas, quota, 0)
    assert error.retry_ms is not None
    assert error.retry_ms > 60_000
    quotas.end(lease, 50, 0)
    again = enter(quotas, quota, 0)
    quotas.reserve(again, 5, 5, 0)  # of 60, 50 are used
    quotas.end(again, 0, 0)


def test_only_looking_in_vain_uses_up_what_may_be_looked_for():
    quotas, quota = Quotas(looks_max=2), Quota(requests_per_minute=2)  # one in 30 s
    for found in (True, True, True, False, False):
        quotas.look("alice", quota, 0)
        quotas.looked("alice", quota, found=found)
    assert exceeded(quotas.look, "alice", quota, 0).retry_ms == 30_000
    for _ in range(2):  # and is none of the requests that it may make
        enter(quotas, quota, 0)


def test_so_many_are_looked_for_at_once():
    quotas, quota = Quotas(looks_max=2), Quota(requests_at_once=1)
    for _ in range(2):
        quotas.look("alice", quota, 0)
    error = exceeded(quotas.look, "alice", quota, 0)
    assert (error.retry_ms, str(error)) == (
        None,
        "2 requests of this API key are being looked for, the most at once",
    )
    quotas.looked("alice", quota, found=False)
    quotas.look("alice", quota, 0)
    for _ in range(9):
        quotas.look("bob", UNLIMITED, 0)


def test_keys_do_not_share_quotas():
    quotas, quota = Quotas(), Quota(requests_at_once=1)
    enter(quotas, quota, 0)
    enter(quotas, quota, 0, "bob")
    exceeded(enter, quotas, quota, 0, "bob")


def test_a_quota_that_changes_holds_at_once():
    quotas = Quotas()
    for _ in range(5):
        quotas.end(enter(quotas, Quota(requests_per_minute=100), 0), 0, 0)
    for _ in range(2):
        quotas.end(enter(quotas, Quota(requests_per_minute=2), 0), 0, 0)
    assert exceeded(enter, quotas, Quota(requests_per_minute=2), 0).retry_ms == 30_000


QUOTA = Quota(
    requests_per_minute=50, requests_at_once=5, tokens_per_minute=2_000, kv_tokens_at_once=900
)
_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "reserve", "end"]),
        st.floats(0, 20_000),  # ms since the event before
        st.integers(1, 400),
        st.integers(1, 400),
    ),
    max_size=80,
)


@given(_EVENTS)
def test_whatever_comes_no_quota_is_passed_and_all_comes_back(events):
    quotas, now, open_leases, waiting = Quotas(), 0.0, {}, []
    used: list[tuple[float, int]] = []
    hints: list[int | None] = []
    for kind, gap, prompt, answer in events:
        now += gap
        try:
            if kind == "enter":
                waiting.append(enter(quotas, QUOTA, now))
            elif kind == "reserve" and waiting:
                lease = waiting.pop()
                open_leases[id(lease)] = (lease, prompt + answer // 2)
                quotas.reserve(lease, prompt, answer, now)
            elif kind == "end" and open_leases:
                lease, tokens = open_leases.pop(next(iter(open_leases)))
                quotas.end(lease, min(tokens, lease.tokens), now)
                used.append((now, min(tokens, lease.tokens)))
        except QuotaExceededError as error:
            hints.append(error.retry_ms)
        running = [lease for lease, _ in open_leases.values()] + waiting
        assert len(running) <= 5
        assert sum(lease.tokens for lease in running) <= 900
        assert sum(n for at, n in used) <= 2_000 * (1 + now / 60_000) + 1
    for lease in [lease for lease, _ in open_leases.values()] + waiting:
        quotas.end(lease, 0, now)
    assert all(hint is None or 0 < hint <= 60_000 for hint in hints)
    account = quotas._accounts.get("alice")
    assert account is None or (account.running, account.kv_tokens) == (0, 0)


def test_a_raised_quota_is_good_while_requests_of_the_old_one_end():
    quotas = Quotas()
    low, high = Quota(tokens_per_minute=100), Quota(tokens_per_minute=10_000)
    old = enter(quotas, low, 0)
    quotas.reserve(old, 50, 50, 0)
    quotas.end(enter(quotas, high, 60_000), 0, 60_000)  # a minute's at the old pace, raised
    lease = enter(quotas, high, 120_000)  # and a minute's at the new one
    quotas.end(old, 0, 120_000)
    quotas.reserve(lease, 5_000, 5_000, 120_000)


def test_a_lowered_quota_is_good_while_requests_of_the_old_one_end():
    quotas = Quotas()
    low, high = Quota(tokens_per_minute=100), Quota(tokens_per_minute=10_000)
    old = enter(quotas, high, 0)
    quotas.reserve(old, 5_000, 4_000, 0)
    lease = enter(quotas, low, 1)
    quotas.end(old, 0, 2)
    quotas.reserve(lease, 50, 50, 2)
    assert exceeded(enter, quotas, low, 2).retry_ms == 600


def test_the_requests_of_one_call_are_counted_all_or_none():
    quotas = Quotas()
    quota = Quota(requests_at_once=3, requests_per_minute=4)
    first, second = quotas.enter_all("a", quota, 2, 0.0)
    with pytest.raises(QuotaExceededError, match="3 requests of this API key are running"):
        quotas.enter_all("a", quota, 2, 0.0)
    third, *_ = quotas.enter_all("a", quota, 1, 0.0)
    for lease in (first, second, third):
        quotas.end(lease, 0, 0.0)
    with pytest.raises(QuotaExceededError, match="4 requests a minute"):
        quotas.enter_all("a", quota, 2, 0.0)
    assert quotas.enter_all("a", quota, 1, 0.0), "those refused have used up nothing"
    for count in (4, 5):
        with pytest.raises(BeyondQuotaError, match=f"{count} answers in one call"):
            quotas.enter_all("a", quota, count, 0.0)
