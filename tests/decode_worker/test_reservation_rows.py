"""Every row of the reservations' table, driven through the hand-off as its callers do."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from handoff_states import TOTAL, begin, brought_to, counts, hand_off, receive

from decode_worker.handoff import HandOff
from decode_worker.reservation import TRANSITIONS, Reservation, ReservationEvent, ReservationState
from kvrelay.kv.ledger import BlockState
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.transport.errors import RefusedError

S, E, B = ReservationState, ReservationEvent, BlockState


def commit(handoff: HandOff, r: Reservation) -> None:
    if r.state is S.RECEIVING:
        receive(handoff, r)
    handoff.commit(r.transfer_id, len(r.prompt_blocks))


def router_lost(handoff: HandOff, r: Reservation) -> None:
    for key in handoff.session_ended("router"):
        assert key == r.key
        handoff.abort(key, E.ROUTER_LOST, in_step=True)


def let_go(why: ReservationEvent) -> Callable[[HandOff, Reservation], object]:
    return lambda handoff, r: handoff.abort(r.key, why, in_step=True)


DRIVERS: dict[ReservationEvent, Callable[[HandOff, Reservation], object]] = {
    E.BEGIN: begin,
    E.COMMIT: commit,
    E.PREFILL: lambda handoff, r: handoff.claim_for_engine(r.key),
    E.COMPUTED: lambda handoff, r: handoff.computed(r.key),
    E.FINISH: lambda handoff, r: handoff.finish(r.key),
    E.CANCEL: let_go(E.CANCEL),
    E.TIMEOUT: let_go(E.TIMEOUT),
    E.ROUTER_LOST: router_lost,
    E.WRITER_LOST: lambda handoff, r: handoff.writer_lost(r.transfer_id),
    E.FAIL: let_go(E.FAIL),
    E.ENGINE_IDLE: lambda handoff, r: handoff.engine_idle(r.key),
    E.DRAIN: lambda handoff, r: handoff.drain(),
}

# What the blocks of a reservation are: two of the prompt, one for the answer.
HELD = {
    S.RESERVED: {B.RESERVED: 3},
    S.RECEIVING: {B.WRITING: 2, B.RESERVED: 1},
    S.PREFILLING: {B.OWNED: 3},
    S.DECODING: {B.OWNED: 3},
    S.REVOKING: {B.QUARANTINED: 2},
    S.ABORTING: {B.QUARANTINED: 3},
    S.CLOSED: {},
}
LIVE = [state for state in S if state is not S.CLOSED]
ILLEGAL = [pair for pair in itertools.product(LIVE, E) if pair not in TRANSITIONS]


@pytest.fixture
def handoff() -> Iterator[HandOff]:
    with hand_off() as handoff:
        yield handoff


def names(value: object) -> str:
    return getattr(value, "name", str(value))


def held(handoff: HandOff) -> dict[BlockState, int]:
    return {state: n for state, n in counts(handoff).items() if state is not B.FREE}


@pytest.mark.parametrize(("state", "event"), list(TRANSITIONS), ids=names)
def test_a_row_moves_the_reservation_and_its_blocks(handoff, monkeypatch, state, event):
    reservation = brought_to(handoff, state)
    seen = []
    on = Reservation.on
    monkeypatch.setattr(Reservation, "on", lambda r, e: (seen.append(e), on(r, e)))
    DRIVERS[event](handoff, reservation)
    assert seen == [event]
    assert reservation.state is TRANSITIONS[state, event]
    handoff.cache.check()
    assert held(handoff) == HELD[reservation.state]
    assert sum(handoff.ledger.counts().values()) == TOTAL
    assert len(handoff) == (reservation.state is not S.CLOSED)


@pytest.mark.parametrize(("state", "event"), ILLEGAL, ids=names)
def test_what_is_no_row_changes_nothing(handoff, state, event):
    reservation = brought_to(handoff, state)
    before = dict(vars(reservation), signature=b"")
    if (state, event) == (S.REVOKING, E.COMMIT):
        assert handoff.commit(reservation.transfer_id, 2) is None  # it crossed our Abort
    else:
        with pytest.raises((IllegalTransitionError, RefusedError)):
            DRIVERS[event](handoff, reservation)
    assert dict(vars(reservation), signature=b"") == before
    handoff.cache.check()
    assert held(handoff) == HELD[state]
