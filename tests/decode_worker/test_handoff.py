import copy
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kv_fixtures import LAYOUT, sampling

from decode_worker.handoff import (
    TRANSITIONS,
    HandOff,
    InvalidReservationError,
    Key,
    Reservation,
    ReservationEvent,
    ReservationState,
)
from kvrelay.kv.ledger import BlockLedger, BlockState, OutOfBlocksError
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.transport.errors import RefusedError, Rejection

S, E, B = ReservationState, ReservationEvent, BlockState
TOTAL = 8
LEASE_MS = 100
RESENDS_MAX = 2
KEY: Key = ("router", 1)
PROMPT = 8  # tokens; two blocks, and one more for the answer


@pytest.fixture
def handoff() -> Iterator[HandOff]:
    """Whatever the test leaves behind is let go of; then every block must be free."""
    ledger = BlockLedger(TOTAL)
    handoff = HandOff(
        LAYOUT, ledger, lease_ms=LEASE_MS, reservations_max=4, resends_max=RESENDS_MAX
    )
    yield handoff
    ledger.check()
    for reservation in list(handoff._by_key.values()):
        let_go(handoff, reservation)
    ledger.check()
    assert ledger.free == TOTAL
    assert len(handoff) == 0


def let_go(handoff: HandOff, reservation: Reservation) -> None:
    handoff.abort(reservation.key, in_step=True)
    handoff.writer_lost(reservation.transfer_id)
    if handoff.is_aborting(reservation.key):
        handoff.engine_idle(reservation.key)


def reserve(handoff: HandOff, number: int = 1, prompt: int = PROMPT, answer: int = 2, now=0):
    return handoff.reserve(("router", number), prompt, sampling(max_tokens=answer), now)


def begin(handoff: HandOff, reservation: Reservation, now: float = 0) -> None:
    handoff.begin(reservation.transfer_id, reservation.secret, now)


def receive(handoff: HandOff, reservation: Reservation, now: float = 0) -> None:
    """All blocks of the prompt, one by one."""
    for index in range(len(reservation.prompt_blocks)):
        handoff.expect(reservation.transfer_id, index, 1)
        handoff.received(reservation.transfer_id, reservation.blocks_received, 1, (), now)


def brought_to(handoff: HandOff, state: ReservationState, number: int = 1) -> Reservation:
    reservation = reserve(handoff, number)
    if state is S.RESERVED:
        return reservation
    begin(handoff, reservation)
    if state is S.DECODING:
        receive(handoff, reservation)
        handoff.commit(reservation.transfer_id, len(reservation.prompt_blocks))
    elif state is S.ABORTING:
        handoff.abort(reservation.key)
    assert reservation.state is state
    return reservation


def counts(handoff: HandOff) -> dict[BlockState, int]:
    return {state: n for state, n in handoff.ledger.counts().items() if n}


def names(value: object) -> str:
    return getattr(value, "name", str(value))


# ---- the table


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)), ids=names)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    reservation = Reservation(KEY, 1, b"", 4, sampling(), [0], [], 0.0, state)
    before = copy.copy(reservation)
    if (state, event) in TRANSITIONS:
        reservation.on(event)
        assert reservation.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            reservation.on(event)
        assert vars(reservation) == vars(before)


def test_nothing_leads_out_of_closed_and_abort_is_legal_everywhere_else():
    assert {state for state, event in TRANSITIONS if event is E.ABORT} == set(S) - {S.CLOSED}
    assert not [event for state, event in TRANSITIONS if state is S.CLOSED]


# ---- reserve


@pytest.mark.parametrize(
    ("prompt", "answer", "prompt_blocks", "growth_blocks"),
    [(4, 1, 1, 0), (5, 1, 2, 0), (4, 2, 1, 1), (4, 5, 1, 1), (4, 6, 1, 2), (1, 4, 1, 0)],
)
def test_blocks_are_reserved_for_prompt_and_answer_but_not_for_the_last_token(
    handoff, prompt, answer, prompt_blocks, growth_blocks
):
    reservation = reserve(handoff, prompt=prompt, answer=answer)
    assert len(reservation.prompt_blocks) == prompt_blocks
    assert len(reservation.growth_blocks) == growth_blocks
    assert counts(handoff)[B.RESERVED] == prompt_blocks + growth_blocks


def test_reserve_is_all_or_nothing(handoff):
    reserve(handoff, 1, prompt=24)
    with pytest.raises(OutOfBlocksError):
        reserve(handoff, 2, prompt=8)
    assert counts(handoff) == {B.FREE: 1, B.RESERVED: 7}
    assert len(handoff) == 1


def test_what_could_never_fit_is_told_apart_from_what_does_not_fit_now(handoff):
    reserve(handoff, 1)
    with pytest.raises(InvalidReservationError, match="need 9 KV blocks; this worker has 8"):
        reserve(handoff, 2, prompt=33, answer=1)
    assert len(handoff) == 1


def test_a_key_has_one_reservation(handoff):
    reserve(handoff)
    with pytest.raises(InvalidReservationError, match="already"):
        reserve(handoff)
    assert len(handoff) == 1


def test_too_many_reservations_are_no_room_now_not_no_room_ever(handoff):
    for number in range(4):
        reserve(handoff, number, prompt=1, answer=1)
    with pytest.raises(OutOfBlocksError):
        reserve(handoff, 5, prompt=1, answer=1)


# ---- begin


def test_begin_gives_leave_to_write_the_prompts_blocks_only(handoff):
    begin(handoff, reserve(handoff))
    assert counts(handoff) == {B.FREE: 5, B.RESERVED: 1, B.WRITING: 2}


def test_a_wrong_secret_is_refused_and_the_right_one_still_works(handoff):
    reservation = reserve(handoff)
    for secret in (b"", b"\0" * 16, reservation.secret[:-1], reservation.secret + b"\0"):
        with pytest.raises(RefusedError, match="secret is wrong"):
            handoff.begin(reservation.transfer_id, secret, 0)
    assert reservation.state is S.RESERVED
    begin(handoff, reservation)


def test_secrets_of_two_tickets_differ(handoff):
    one, other = reserve(handoff, 1, prompt=1), reserve(handoff, 2, prompt=1)
    with pytest.raises(RefusedError, match="secret is wrong"):
        handoff.begin(one.transfer_id, other.secret, 0)


def test_an_unknown_transfer_is_refused(handoff):
    with pytest.raises(RefusedError, match="no such transfer"):
        handoff.begin(7, b"", 0)


@pytest.mark.parametrize("state", [S.RECEIVING, S.ABORTING])
def test_a_ticket_is_good_once(handoff, state):
    reservation = brought_to(handoff, state)
    with pytest.raises(RefusedError, match="has been used"):
        begin(handoff, reservation)
    assert reservation.state is state


@pytest.mark.parametrize("state", [S.DECODING, S.CLOSED])
def test_the_ticket_of_a_transfer_that_ended_is_unknown(handoff, state):
    reservation = brought_to(handoff, S.RESERVED if state is S.CLOSED else state)
    if state is S.CLOSED:
        handoff.abort(reservation.key)
    with pytest.raises(RefusedError, match="no such transfer"):
        begin(handoff, reservation)


# ---- blocks


def test_blocks_go_where_the_reservation_says_in_order(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    first, second = reservation.prompt_blocks
    assert handoff.expect(reservation.transfer_id, 0, 1) == [first]
    handoff.received(reservation.transfer_id, reservation.blocks_received, 1, (), 0)
    assert handoff.expect(reservation.transfer_id, 1, 1) == [second]


@pytest.mark.parametrize(
    ("received", "first", "count", "rejection"),
    [
        (0, 1, 1, Rejection.REORDERED),
        (1, 0, 1, Rejection.DUPLICATE),
        (0, 0, 3, Rejection.OVERSIZED),
        (1, 1, 2, Rejection.OVERSIZED),
        (2, 2, 1, Rejection.OVERSIZED),
        (2, 0, 2, Rejection.DUPLICATE),
    ],
    ids=["gap", "repeated", "too many", "too many at the end", "after the last", "all repeated"],
)
def test_blocks_out_of_order_repeated_or_too_many_are_refused(
    handoff, received, first, count, rejection
):
    reservation = brought_to(handoff, S.RECEIVING)
    handoff.received(reservation.transfer_id, 0, received, (), 0)
    expected = {
        Rejection.OVERSIZED: f"blocks to {first + count} sent, the ticket ends at 2",
        Rejection.REORDERED: f"blocks from {first} sent, expected from {received}",
        Rejection.DUPLICATE: f"blocks from {first} sent, expected from {received}",
    }
    with pytest.raises(RefusedError, match=expected[rejection]) as refused:
        handoff.expect(reservation.transfer_id, first, count)
    assert refused.value.rejection is rejection
    assert reservation.blocks_received == received


def test_blocks_already_on_the_wire_find_their_place_after_an_abort(handoff):
    reservation = brought_to(handoff, S.ABORTING)
    assert handoff.expect(reservation.transfer_id, 0, 2) == reservation.prompt_blocks
    handoff.received(reservation.transfer_id, reservation.blocks_received, 2, (), 0)
    assert counts(handoff)[B.QUARANTINED] == 2


# ---- bad blocks


def test_a_bad_block_may_come_again_and_no_other(handoff):
    r = brought_to(handoff, S.RECEIVING)
    handoff.received(r.transfer_id, 0, 2, [1], 0)
    assert handoff.awaits_again(r.transfer_id)
    for first, count in ((0, 1), (0, 2)):
        with pytest.raises(RefusedError, match=r"blocks \[0\] sent again, which nobody") as refused:
            handoff.expect(r.transfer_id, first, count, again=True)
        assert refused.value.rejection is Rejection.DUPLICATE
    assert handoff.expect(r.transfer_id, 1, 1, again=True) == r.prompt_blocks[1:]
    handoff.received(r.transfer_id, 1, 1, (), 0)
    assert not handoff.awaits_again(r.transfer_id)
    with pytest.raises(RefusedError, match="nobody asked for"):
        handoff.expect(r.transfer_id, 1, 1, again=True)


def test_blocks_go_on_in_order_while_a_bad_one_is_awaited(handoff):
    r = brought_to(handoff, S.RECEIVING)
    handoff.received(r.transfer_id, 0, 1, [0], 0)
    assert handoff.expect(r.transfer_id, 1, 1) == r.prompt_blocks[1:]
    handoff.received(r.transfer_id, 1, 1, (), 0)
    handoff.received(r.transfer_id, 0, 1, (), 0)
    assert r.blocks_received == 2
    assert handoff.commit(r.transfer_id, 2) is r


def test_a_bad_block_is_missing_until_it_came_again(handoff):
    r = brought_to(handoff, S.RECEIVING)
    handoff.received(r.transfer_id, 0, 2, [0], 0)
    with pytest.raises(RefusedError, match="Commit of 2 blocks while 1 are missing"):
        handoff.commit(r.transfer_id, 2)
    handoff.received(r.transfer_id, 0, 1, (), 0)
    assert handoff.commit(r.transfer_id, 2) is r


def test_each_block_may_be_bad_resends_max_times_and_not_once_more(handoff):
    r = brought_to(handoff, S.RECEIVING)
    handoff.received(r.transfer_id, 0, 2, [0, 1], 0)
    handoff.received(r.transfer_id, 0, 1, [0], 0)
    handoff.received(r.transfer_id, 1, 1, [1], 0)
    with pytest.raises(RefusedError, match="block 1 has a wrong checksum") as refused:
        handoff.received(r.transfer_id, 1, 1, [1], 0)
    assert refused.value.rejection is Rejection.CHECKSUM


def test_a_bad_block_that_comes_again_renews_the_lease(handoff):
    r = brought_to(handoff, S.RECEIVING)
    handoff.received(r.transfer_id, 0, 1, [0], 10)
    handoff.received(r.transfer_id, 0, 1, (), 60)
    assert handoff.expired(LEASE_MS + 59) == []
    assert handoff.expired(LEASE_MS + 60) == [r.key]


# ---- commit


def test_commit_makes_every_block_the_requests_own(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert counts(handoff) == {B.FREE: 5, B.OWNED: 3}
    handoff.finish(reservation.key)
    assert counts(handoff) == {B.FREE: TOTAL}


@pytest.mark.parametrize(("received", "named"), [(0, 2), (1, 2), (1, 1), (2, 1), (2, 3)])
def test_commit_is_refused_unless_every_block_is_in_and_named(handoff, received, named):
    reservation = brought_to(handoff, S.RECEIVING)
    handoff.received(reservation.transfer_id, reservation.blocks_received, received, (), 0)
    with pytest.raises(RefusedError, match=f"Commit of {named} blocks while {2 - received} are"):
        handoff.commit(reservation.transfer_id, named)
    assert reservation.state is S.RECEIVING
    assert counts(handoff)[B.WRITING] == 2


def test_commit_after_an_abort_changes_nothing(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    receive(handoff, reservation)
    assert handoff.abort(reservation.key) == reservation.transfer_id
    assert handoff.commit(reservation.transfer_id, 2) is None
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}


# ---- the writer is lost


def test_a_writer_lost_while_it_wrote_fails_the_reservation_and_frees_it(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    assert handoff.writer_lost(reservation.transfer_id) is reservation
    assert counts(handoff) == {B.FREE: TOTAL}
    assert len(handoff) == 0


def test_a_writer_lost_after_an_abort_frees_the_quarantine_and_is_no_news(handoff):
    reservation = brought_to(handoff, S.ABORTING)
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}
    assert handoff.writer_lost(reservation.transfer_id) is None
    assert counts(handoff) == {B.FREE: TOTAL}


def test_a_writer_lost_after_commit_does_not_touch_the_running_sequence(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert handoff.writer_lost(reservation.transfer_id) is None
    assert reservation.state is S.DECODING
    assert counts(handoff)[B.OWNED] == 3


def test_a_writer_nobody_knows_is_no_news(handoff):
    assert handoff.writer_lost(99) is None


# ---- abort


def test_abort_before_a_writer_came_frees_at_once(handoff):
    reservation = brought_to(handoff, S.RESERVED)
    assert handoff.abort(reservation.key) is None
    assert counts(handoff) == {B.FREE: TOTAL}


def test_abort_under_a_writer_names_it_and_keeps_only_what_it_may_write(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    assert handoff.abort(reservation.key) == reservation.transfer_id
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}
    assert handoff.is_aborting(reservation.key)


def test_abort_between_steps_frees_at_once(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert handoff.abort(reservation.key) is None
    assert counts(handoff) == {B.FREE: TOTAL}
    assert not handoff.is_aborting(reservation.key)


def test_abort_during_a_step_waits_for_the_engine(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert handoff.abort(reservation.key, in_step=True) is None
    assert handoff.is_aborting(reservation.key)
    assert counts(handoff) == {B.FREE: 5, B.QUARANTINED: 3}
    handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: TOTAL}


def test_a_second_abort_and_one_of_an_ended_request_change_nothing(handoff):
    reservation = brought_to(handoff, S.ABORTING)
    assert handoff.abort(reservation.key) is None
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}
    handoff.writer_lost(reservation.transfer_id)
    assert handoff.abort(reservation.key) is None


def test_an_idle_engine_does_not_free_blocks_that_a_writer_may_still_write(handoff):
    reservation = reserve(handoff, answer=1)  # no growth blocks
    begin(handoff, reservation)
    handoff.abort(reservation.key)
    with pytest.raises(IllegalTransitionError):
        handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}


def test_a_lost_session_is_answered_with_exactly_its_keys(handoff):
    ours, theirs = object(), object()
    for key in ((ours, 1), (theirs, 1), (ours, 2)):
        handoff.reserve(key, 4, sampling(max_tokens=1), 0)
    assert handoff.of_session(ours) == [(ours, 1), (ours, 2)]


# ---- leases


def test_a_lease_runs_out_at_its_end_and_not_before(handoff):
    reservation = reserve(handoff, now=50)
    assert handoff.expired(50 + LEASE_MS - 1) == []
    assert handoff.expired(50 + LEASE_MS) == [reservation.key]


def test_begin_and_every_block_renew_the_lease(handoff):
    reservation = reserve(handoff)
    begin(handoff, reservation, now=60)
    assert handoff.expired(LEASE_MS + 59) == []
    handoff.received(reservation.transfer_id, reservation.blocks_received, 1, (), 120)
    assert handoff.expired(LEASE_MS + 119) == []
    assert handoff.expired(LEASE_MS + 120) == [reservation.key]


@pytest.mark.parametrize("state", [S.DECODING, S.ABORTING])
def test_what_waits_for_no_writer_has_no_lease(handoff, state):
    brought_to(handoff, state)
    assert handoff.expired(1e9) == []


# ---- all of it at random


class HandOffMachine(RuleBasedStateMachine):
    """Routers, writers, the engine and the clock, in any order.

    `writing` and `stepping` are the truth about who may touch which blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(TOTAL)
        self.handoff = HandOff(
            LAYOUT, self.ledger, lease_ms=LEASE_MS, reservations_max=5, resends_max=RESENDS_MAX
        )
        self.now = 0.0
        self.number = 0
        self.live: dict[Key, Reservation] = {}
        self.writing: dict[int, Reservation] = {}
        self.stepping: dict[Key, Reservation] = {}

    def pick(self, data: st.DataObject, *states: ReservationState) -> Reservation | None:
        some = [r for r in self.live.values() if not states or r.state in states]
        return data.draw(st.sampled_from(some)) if some else None

    def pick_writer(self, data: st.DataObject) -> Reservation | None:
        return data.draw(st.sampled_from(list(self.writing.values()))) if self.writing else None

    @rule(prompt=st.integers(1, 20), answer=st.integers(1, 9))
    def reserve(self, prompt: int, answer: int) -> None:
        self.number += 1
        key = ("router", self.number)
        try:
            r = self.handoff.reserve(key, prompt, sampling(max_tokens=answer), self.now)
        except (OutOfBlocksError, InvalidReservationError):
            return
        for other in (*self.live.values(), *self.writing.values(), *self.stepping.values()):
            if other.state is not S.CLOSED:
                held = other.blocks
                if other.key in self.live and other.state is S.ABORTING:
                    held = other.prompt_blocks if other.transfer_id in self.writing else held
                assert not set(r.blocks) & set(held), "a block in use was given away"
        self.live[key] = r

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if r := self.pick(data, S.RESERVED):
            self.handoff.begin(r.transfer_id, r.secret, self.now)
            self.writing[r.transfer_id] = r

    @rule(data=st.data(), count=st.integers(1, 3))
    def blocks(self, data: st.DataObject, count: int) -> None:
        if r := self.pick_writer(data):
            first = r.blocks_received
            try:
                targets = self.handoff.expect(r.transfer_id, first, count)
            except RefusedError:
                assert first + count > len(r.prompt_blocks)
            else:
                assert list(targets) == r.prompt_blocks[first : first + count]
                bad = data.draw(st.sets(st.integers(first, first + count - 1)))
                self.handoff.received(r.transfer_id, first, count, sorted(bad), self.now)

    @rule(data=st.data(), good=st.booleans())
    def again(self, data: st.DataObject, good: bool) -> None:
        if (r := self.pick_writer(data)) and r.bad_blocks:
            index = data.draw(st.sampled_from(sorted(r.bad_blocks)))
            assert list(self.handoff.expect(r.transfer_id, index, 1, again=True)) == [
                r.prompt_blocks[index]
            ]
            try:
                self.handoff.received(r.transfer_id, index, 1, () if good else (index,), self.now)
            except RefusedError:
                assert r.resends[index] > RESENDS_MAX
            assert (index in r.bad_blocks) == (not good)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if r := self.pick_writer(data):
            complete = r.blocks_received == len(r.prompt_blocks) and not r.bad_blocks
            aborting = r.state is S.ABORTING
            try:
                committed = self.handoff.commit(r.transfer_id, len(r.prompt_blocks))
            except RefusedError:
                assert not complete
                return
            assert (committed is None) == aborting
            if committed is not None:
                assert complete
                del self.writing[r.transfer_id]

    @rule(data=st.data())
    def step_begins(self, data: st.DataObject) -> None:
        if (r := self.pick(data, S.DECODING)) and r.key not in self.stepping:
            self.stepping[r.key] = r

    @rule(data=st.data())
    def step_ends(self, data: st.DataObject) -> None:
        if self.stepping:
            r = self.stepping.pop(data.draw(st.sampled_from(list(self.stepping))))
            if self.handoff.is_aborting(r.key):
                self.handoff.engine_idle(r.key)
                self.live.pop(r.key)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if (r := self.pick(data, S.DECODING)) and r.key not in self.stepping:
            self.handoff.finish(r.key)
            del self.live[r.key]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if r := self.pick(data):
            self.abort_one(r)

    def abort_one(self, r: Reservation) -> None:
        told = self.handoff.abort(r.key, in_step=r.key in self.stepping)
        assert told is None or told in self.writing
        if r.state is S.CLOSED:
            del self.live[r.key]

    @rule(data=st.data())
    def writer_lost(self, data: st.DataObject) -> None:
        if r := self.pick_writer(data):
            news = r.state is S.RECEIVING
            assert (self.handoff.writer_lost(r.transfer_id) is r) == news
            del self.writing[r.transfer_id]
            del self.live[r.key]

    @rule(ms=st.integers(0, 2 * LEASE_MS))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        for key in self.handoff.expired(self.now):
            self.abort_one(self.live[key])
        assert self.handoff.expired(self.now) == []

    @invariant()
    def the_ledger_balances(self) -> None:
        self.ledger.check()
        assert len(self.handoff) == len(self.live)

    @invariant()
    def what_somebody_may_write_is_not_free(self) -> None:
        held = [b for r in self.writing.values() for b in r.prompt_blocks]
        held += [b for r in self.stepping.values() for b in r.blocks]
        assert len(held) == len(set(held)), "a block is in two live reservations"
        assert self.ledger.free <= TOTAL - len(held)

    def teardown(self) -> None:
        for r in list(self.live.values()):
            self.handoff.abort(r.key, in_step=r.key in self.stepping)
        for transfer_id in self.writing:
            self.handoff.writer_lost(transfer_id)
        for key in self.stepping:
            if self.handoff.is_aborting(key):
                self.handoff.engine_idle(key)
        self.ledger.check()
        assert self.ledger.free == TOTAL
        assert len(self.handoff) == 0


TestHandOffMachine = HandOffMachine.TestCase
TestHandOffMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
