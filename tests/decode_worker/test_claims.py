from collections.abc import Iterator

import pytest
from kv_fixtures import LAYOUT, sampling

from decode_worker.claims import Claims
from decode_worker.handoff import HandOff
from decode_worker.reservation import ReservationEvent
from kvrelay.kv.ledger import BlockLedger, OutOfBlocksError

CLAIM_MS, HOLD_MS = 1_000, 5_000
TOTAL = 8
LARGE, SMALL = 6, 2  # blocks


def claims_of(claims_max: int = 2) -> Claims:
    return Claims(claim_ms=CLAIM_MS, hold_ms=HOLD_MS, claims_max=claims_max)


# ---- the claims alone


def test_the_oldest_claim_keeps_blocks_from_all_sessions_but_its_own():
    claims = claims_of()
    assert claims.kept("a", 0) == 0
    claims.refused("a", 6, 0)
    claims.refused("b", 7, 0)
    assert [claims.kept(session, 1) for session in "abc"] == [0, 6, 6]
    claims.granted("a", 5)  # something smaller: the large one still waits
    assert claims.kept("b", 1) == 6
    claims.granted("a", 6)
    assert [claims.kept(session, 1) for session in "abc"] == [7, 0, 7]


def test_a_claim_that_is_not_asked_for_again_ends():
    claims = claims_of()
    claims.refused("a", 6, 0)
    claims.refused("a", 2, 900)  # another, smaller request
    assert claims.kept("b", CLAIM_MS - 1) == 6
    assert claims.kept("b", CLAIM_MS) == 0
    claims.refused("a", 6, 2000)
    claims.refused("a", 7, 2900)
    assert claims.kept("b", 3800) == 7


def test_no_claim_holds_others_up_for_longer_than_its_time():
    claims = claims_of()
    for now in range(0, HOLD_MS, 500):
        claims.refused("a", 6, now)
        claims.refused("b", 4, now)
        assert claims.kept("b", now) == 6
    assert claims.kept("b", HOLD_MS) == 0  # its own turn now
    assert claims.kept("a", HOLD_MS) == 4


def test_no_more_claims_than_claims_max_and_none_of_a_session_that_ended():
    claims = claims_of(claims_max=1)
    claims.refused("a", 6, 0)
    claims.refused("b", 6, 0)
    assert len(claims) == 1
    claims.leave("a")
    claims.leave("b")
    assert (len(claims), claims.kept("c", 1)) == (0, 0)


# ---- two routers at one hand-off


@pytest.fixture
def handoff() -> Iterator[HandOff]:
    handoff = HandOff(
        LAYOUT,
        BlockLedger(TOTAL),
        lease_ms=100_000,
        reservations_max=20,
        resends_max=1,
        claims=claims_of(),
    )
    yield handoff
    handoff.cache.check()


def asked(handoff: HandOff, session: str, number: int, blocks: int, now: float) -> bool:
    """Whether a prompt of so many blocks gets them."""
    try:
        handoff.reserve((session, number), blocks * LAYOUT.block_size, sampling(), now)
    except OutOfBlocksError:
        return False
    return True


def small_ones(handoff: HandOff, steps: range, large_asks: bool) -> tuple[int | None, list[bool]]:
    """A router that keeps the worker full of small requests, one of which ends at each step of
    100 ms, and another that asks for a large one meanwhile. Returns when that got its blocks."""
    running = [n for n in range(TOTAL // SMALL) if asked(handoff, "small", n, SMALL, 0)]
    large_at, served = None, []
    for step in steps:
        now = step * 100
        if running:
            handoff.abort(("small", running.pop(0)), ReservationEvent.CANCEL)
        if large_asks and large_at is None and asked(handoff, "large", 1, LARGE, now):
            large_at = step
        if number := asked(handoff, "small", 100 + step, SMALL, now):
            running.append(100 + step)
        served.append(bool(number))
    return large_at, served


def test_a_large_request_gets_in_when_the_running_ones_have_ended(handoff):
    large_at, served = small_ones(handoff, range(1, 10), large_asks=True)
    assert large_at == LARGE // SMALL
    assert served[large_at - 1 :].count(True) >= 1, "small ones are served again afterwards"
    assert not any(served[: large_at - 1])


def test_a_router_that_is_gone_holds_nobody_up(handoff):
    assert asked(handoff, "small", 1, 4, 0)
    assert not asked(handoff, "large", 1, LARGE, 0)
    assert not asked(handoff, "small", 2, SMALL, 1)
    assert handoff.session_ended("large") == []
    assert asked(handoff, "small", 2, SMALL, 1)


def test_who_leaves_what_a_claim_needs_is_served(handoff):
    assert asked(handoff, "small", 1, 3, 0)
    assert not asked(handoff, "large", 1, LARGE, 0)
    handoff.abort(("small", 1), ReservationEvent.CANCEL)
    assert asked(handoff, "small", 2, TOTAL - LARGE, 1)
    assert not asked(handoff, "small", 3, 1, 1)
    assert asked(handoff, "large", 1, LARGE, 2)
    assert not asked(handoff, "small", 4, 1, 3)
