import copy
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from handoff_states import (
    LEASE_MS,
    RESENDS_MAX,
    TOTAL,
    begin,
    brought_to,
    counts,
    hand_off,
    receive,
    reserve,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_fixtures import LAYOUT, sampling

from decode_worker.handoff import HandOff
from decode_worker.reservation import (
    TRANSITIONS,
    InvalidReservationError,
    Key,
    Reservation,
    ReservationEvent,
    ReservationState,
)
from kvrelay.draining import DrainingError
from kvrelay.kv.ledger import BlockLedger, BlockState, OutOfBlocksError
from kvrelay.kv.prefix import PrefixChain, chain_root
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.transport.errors import RefusedError, Rejection
from kvrelay.wire.transfer_pb2 import Endpoint, Ticket

S, E, B = ReservationState, ReservationEvent, BlockState
KEY: Key = ("router", 1)
ROOT = chain_root("model", LAYOUT.block_size, "")


@pytest.fixture
def handoff() -> Iterator[HandOff]:
    with hand_off() as handoff:
        yield handoff


def names(value: object) -> str:
    return getattr(value, "name", str(value))


# ---- the table


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)), ids=names)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    reservation = Reservation(KEY, 1, 4, sampling(), [0], 0, 1, 0.0, state)
    before = copy.copy(reservation)
    if (state, event) in TRANSITIONS:
        reservation.on(event)
        assert reservation.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            reservation.on(event)
        assert vars(reservation) == vars(before)


@pytest.mark.parametrize(
    "event", [E.CANCEL, E.TIMEOUT, E.ROUTER_LOST, E.WRITER_LOST, E.DRAIN], ids=names
)
def test_what_may_come_at_any_moment_is_a_row_in_every_state_but_closed(event):
    assert {state for state, its in TRANSITIONS if its is event} == set(S) - {S.CLOSED}
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


def refused(handoff: HandOff, ticket: Ticket, now: float = 0) -> Rejection:
    with pytest.raises(RefusedError) as caught:
        handoff.begin(ticket, now)
    return caught.value.rejection


def a_ticket(handoff: HandOff, reservation: Reservation) -> Ticket:
    """With something in every field."""
    ticket = Ticket(
        request_id="r",
        attempt=1,
        decode_instance_id="d",
        layout=LAYOUT.to_wire(),
        endpoints=[Endpoint(transport="tcp", address="127.0.0.1:1")],
        lease_ms=LEASE_MS,
    )
    return handoff.sign(reservation, ticket)


def test_a_wrong_signature_is_refused_and_the_right_one_still_works(handoff):
    reservation = reserve(handoff)
    ticket = a_ticket(handoff, reservation)
    right = ticket.signature
    for signature in (b"", b"\0" * 32, right[:-1], right + b"\0"):
        ticket.signature = signature
        assert refused(handoff, ticket) is Rejection.FORGED
    assert reservation.state is S.RESERVED
    ticket.signature = right
    handoff.begin(ticket, 0)


@pytest.mark.parametrize("field", [f.name for f in Ticket.DESCRIPTOR.fields])
def test_a_ticket_with_any_field_altered_is_refused(handoff, field):
    ticket = a_ticket(handoff, reserve(handoff))
    what = Ticket.DESCRIPTOR.fields_by_name[field]
    if what.message_type is not None:
        ticket.ClearField(field)
    elif isinstance(getattr(ticket, field), str | bytes):
        setattr(ticket, field, getattr(ticket, field)[:-1])
    elif field == "block_ids":
        ticket.block_ids[0] += 1
    else:
        setattr(ticket, field, getattr(ticket, field) + 1)
    elsewhere = field in ("signature", "transfer_id")
    assert refused(handoff, ticket) is (Rejection.FORGED if elsewhere else Rejection.ALTERED)


def test_what_an_unknown_field_says_is_signed_too(handoff):
    ticket = a_ticket(handoff, reserve(handoff))
    more = Ticket.FromString(ticket.SerializeToString() + b"\xf8\x07\x01")
    assert refused(handoff, more) is Rejection.ALTERED


def test_the_signature_of_one_ticket_is_no_good_for_another(handoff):
    one, other = (a_ticket(handoff, reserve(handoff, n, prompt=1)) for n in (1, 2))
    one.signature = other.signature
    assert refused(handoff, one) is Rejection.FORGED


def test_another_workers_ticket_is_forged(handoff):
    other = HandOff(
        LAYOUT, BlockLedger(TOTAL), lease_ms=LEASE_MS, reservations_max=4, resends_max=RESENDS_MAX
    )
    reserve(handoff)
    assert refused(handoff, a_ticket(other, reserve(other))) is Rejection.FORGED


def test_a_ticket_expires(handoff):
    reservation = reserve(handoff)
    ticket = a_ticket(handoff, reservation)
    assert ticket.expires_ms == LEASE_MS
    assert refused(handoff, ticket, LEASE_MS) is Rejection.EXPIRED
    handoff.abort(reservation.key, E.CANCEL)
    assert refused(handoff, ticket, LEASE_MS) is Rejection.EXPIRED
    assert refused(handoff, ticket, LEASE_MS - 1) is Rejection.STALE


def test_an_unknown_transfer_is_refused(handoff):
    assert refused(handoff, Ticket(transfer_id=7)) is Rejection.FORGED


@pytest.mark.parametrize("state", [S.RECEIVING, S.REVOKING])
def test_a_ticket_is_good_once(handoff, state):
    reservation = brought_to(handoff, state)
    with pytest.raises(RefusedError, match="has been used"):
        begin(handoff, reservation)
    assert reservation.state is state


@pytest.mark.parametrize("state", [S.DECODING, S.CLOSED])
def test_the_ticket_of_a_transfer_that_ended_is_unknown(handoff, state):
    reservation = brought_to(handoff, S.RESERVED if state is S.CLOSED else state)
    if state is S.CLOSED:
        handoff.abort(reservation.key, E.CANCEL)
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
    reservation = brought_to(handoff, S.REVOKING)
    assert handoff.expect(reservation.transfer_id, 0, 2) == reservation.prompt_blocks
    handoff.received(reservation.transfer_id, reservation.blocks_received, 2, (), 0)
    assert counts(handoff)[B.QUARANTINED] == 2


@pytest.mark.parametrize("state", [S.RESERVED, S.PREFILLING, S.DECODING, S.ABORTING])
def test_what_comes_for_a_transfer_that_nobody_may_write_to_is_refused(handoff, state):
    transfer_id = brought_to(handoff, state).transfer_id
    for what in (
        lambda: handoff.expect(transfer_id, 0, 1),
        lambda: handoff.received(transfer_id, 0, 1, (), 0),
        lambda: handoff.awaits_again(transfer_id),
        lambda: handoff.commit(transfer_id, 2),
    ):
        with pytest.raises(RefusedError) as refused:
            what()
        assert refused.value.rejection is Rejection.STALE


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
    assert handoff.abort(reservation.key, E.CANCEL) == reservation.transfer_id
    assert handoff.commit(reservation.transfer_id, 2) is None
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}


# ---- the writer is lost


def test_a_writer_lost_while_it_wrote_fails_the_reservation_and_frees_it(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    assert handoff.writer_lost(reservation.transfer_id) is reservation
    assert counts(handoff) == {B.FREE: TOTAL}
    assert len(handoff) == 0


def test_a_writer_lost_after_an_abort_frees_the_quarantine_and_is_no_news(handoff):
    reservation = brought_to(handoff, S.REVOKING)
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
    assert handoff.abort(reservation.key, E.CANCEL) is None
    assert counts(handoff) == {B.FREE: TOTAL}


def test_abort_under_a_writer_names_it_and_keeps_only_what_it_may_write(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    assert handoff.abort(reservation.key, E.CANCEL) == reservation.transfer_id
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}
    assert handoff.is_aborting(reservation.key)


def test_abort_between_steps_frees_at_once(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert handoff.abort(reservation.key, E.CANCEL) is None
    assert counts(handoff) == {B.FREE: TOTAL}
    assert not handoff.is_aborting(reservation.key)


def test_abort_during_a_step_waits_for_the_engine(handoff):
    reservation = brought_to(handoff, S.DECODING)
    assert handoff.abort(reservation.key, E.CANCEL, in_step=True) is None
    assert handoff.is_aborting(reservation.key)
    assert counts(handoff) == {B.FREE: 5, B.QUARANTINED: 3}
    handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: TOTAL}


def test_abort_of_a_prompt_that_waits_for_its_turn_here_frees_at_once(handoff):
    reservation = brought_to(handoff, S.PREFILLING)
    assert handoff.abort(reservation.key, E.CANCEL) is None
    assert counts(handoff) == {B.FREE: TOTAL}


def test_abort_during_a_chunk_waits_for_the_engine_and_keeps_what_is_shared(handoff):
    reservation = prefilling(handoff, 1, range(8))
    handoff.share_prompt(reservation.key, 4)
    assert handoff.abort(reservation.key, E.CANCEL, in_step=True) is None
    assert counts(handoff) == {B.FREE: 5, B.CACHED: 1, B.QUARANTINED: 2}
    handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: 7, B.CACHED: 1}


def test_a_second_abort_and_one_of_an_ended_request_change_nothing(handoff):
    reservation = brought_to(handoff, S.REVOKING)
    assert handoff.abort(reservation.key, E.CANCEL) is None
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}
    handoff.writer_lost(reservation.transfer_id)
    assert handoff.abort(reservation.key, E.CANCEL) is None


def test_an_idle_engine_does_not_free_blocks_that_a_writer_may_still_write(handoff):
    reservation = reserve(handoff, answer=1)  # no growth blocks
    begin(handoff, reservation)
    handoff.abort(reservation.key, E.CANCEL)
    with pytest.raises(IllegalTransitionError):
        handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: 6, B.QUARANTINED: 2}


def test_a_lost_session_is_answered_with_exactly_its_keys_that_do_not_decode(handoff):
    ours, theirs = object(), object()
    for key in ((ours, 1), (theirs, 1), (ours, 2), (ours, 3)):
        handoff.reserve(key, 4, sampling(max_tokens=1), 0)
    for key in ((ours, 2), (theirs, 1)):
        handoff.claim_for_engine(key)
        handoff.computed(key)
    assert handoff.session_ended(ours) == [(ours, 1), (ours, 3)]


def test_why_reservations_were_let_go_of_is_counted_once_each(handoff):
    receiving = brought_to(handoff, S.RECEIVING)
    handoff.abort(receiving.key, E.TIMEOUT)
    handoff.abort(receiving.key, E.CANCEL)
    handoff.writer_lost(receiving.transfer_id)
    handoff.writer_lost(brought_to(handoff, S.RECEIVING, 2).transfer_id)
    handoff.abort(brought_to(handoff, S.RESERVED, 3).key, E.CANCEL)
    handoff.finish(brought_to(handoff, S.DECODING, 4).key)
    handoff.abort(("router", 5), E.CANCEL)
    assert handoff.causes == {E.TIMEOUT: 1, E.WRITER_LOST: 1, E.CANCEL: 1}


def test_what_is_no_cause_lets_nothing_go(handoff):
    reservation = brought_to(handoff, S.DECODING)
    with pytest.raises(AssertionError):
        handoff.abort(reservation.key, E.FINISH)
    assert reservation.state is S.DECODING


# ---- draining


def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has(handoff):
    reservation = brought_to(handoff, S.RESERVED)
    handoff.drain()
    with pytest.raises(DrainingError):
        reserve(handoff, 2)
    begin(handoff, reservation)
    receive(handoff, reservation)
    handoff.commit(reservation.transfer_id, len(reservation.prompt_blocks))
    handoff.finish(reservation.key)
    assert len(handoff) == 0
    assert counts(handoff) == {B.FREE: TOTAL}


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


@pytest.mark.parametrize("state", [S.DECODING, S.REVOKING, S.ABORTING])
def test_what_waits_for_no_writer_has_no_lease(handoff, state):
    brought_to(handoff, state)
    assert handoff.expired(1e9) == []


def test_a_prompt_waits_for_its_turn_here_as_long_as_the_engine_makes_steps(handoff):
    reservation = brought_to(handoff, S.PREFILLING)
    assert handoff.expired(LEASE_MS - 1) == []
    handoff.engine_moved(90)
    assert handoff.expired(LEASE_MS + 89) == []
    assert handoff.expired(LEASE_MS + 90) == [reservation.key]


def test_a_prompt_gets_its_lease_at_an_engine_that_was_idle_before_it(handoff):
    handoff.engine_moved(0)
    reservation = reserve(handoff, now=1000)
    handoff.claim_for_engine(reservation.key)
    assert handoff.expired(1000 + LEASE_MS - 1) == []
    assert handoff.expired(1000 + LEASE_MS) == [reservation.key]


# ---- prompts computed here


def prefilling(handoff: HandOff, number: int, prompt: range, answer: int = 2) -> Reservation:
    params = sampling(max_tokens=answer)
    key, chain = ("router", number), chain_of(*prompt)
    reservation = handoff.reserve(key, len(prompt), params, 0, chain, prefill_here=True)
    handoff.claim_for_engine(key)
    return reservation


def test_the_engine_owns_all_blocks_of_a_prompt_computed_here_and_no_writer_gets_leave(handoff):
    reservation = brought_to(handoff, S.PREFILLING)
    assert counts(handoff) == {B.FREE: 5, B.OWNED: 3}
    with pytest.raises(RefusedError) as error:
        begin(handoff, reservation)
    assert error.value.rejection is Rejection.STALE
    handoff.computed(reservation.key)
    assert reservation.state is S.DECODING
    handoff.finish(reservation.key)
    assert counts(handoff) == {B.FREE: TOTAL}


def test_a_ticket_that_has_been_used_leaves_nothing_to_compute_here(handoff):
    reservation = brought_to(handoff, S.RECEIVING)
    with pytest.raises(IllegalTransitionError):
        handoff.claim_for_engine(reservation.key)
    assert counts(handoff) == {B.FREE: 5, B.WRITING: 2, B.RESERVED: 1}


@pytest.mark.parametrize(("prompt", "cached"), [(8, 1), (9, 2), (7, 1), (4, 0)])
def test_the_block_of_the_last_prompt_token_is_private_where_it_is_computed(
    handoff, prompt, cached
):
    served(handoff, 1, range(8))
    reservation = prefilling(handoff, 2, range(prompt))
    assert len(reservation.cached_blocks) == cached
    private = reservation.prompt_blocks + reservation.growth_blocks
    assert {handoff.ledger.state(block) for block in private} == {B.OWNED}


def test_what_is_computed_here_is_shared_block_by_block(handoff):
    reservation = prefilling(handoff, 1, range(8))
    handoff.share_prompt(reservation.key, 3)
    assert cached_for(handoff, range(8)) == 0
    handoff.share_prompt(reservation.key, 6)
    assert cached_for(handoff, range(8)) == 1
    other = prefilling(handoff, 2, range(8))
    assert other.cached_blocks == reservation.blocks[:1]
    handoff.share_prompt(reservation.key, 8)
    handoff.share_prompt(other.key, 8)  # has its own copy of the second: that stays private
    assert cached_for(handoff, range(8)) == 2
    for key in (reservation.key, other.key):
        handoff.computed(key)
        handoff.finish(key, [5, 6])
    assert counts(handoff) == {B.FREE: 6, B.CACHED: 2}


def test_what_others_compute_meanwhile_takes_the_place_of_ones_own_empty_blocks(handoff):
    one, other = prefilling(handoff, 1, range(9)), prefilling(handoff, 2, range(9))
    table = other.blocks
    handoff.share_prompt(one.key, 4)
    assert handoff.catch_up(other.key, 0) == 4
    handoff.share_prompt(one.key, 9)
    assert handoff.catch_up(other.key, 4) == 4
    assert handoff.catch_up(other.key, 8) == 0
    assert other.blocks is table
    assert (table[:2], table[2] != one.blocks[2]) == (one.blocks[:2], True)
    assert counts(handoff) == {B.CACHED: 2, B.OWNED: 2, B.FREE: TOTAL - 4}
    assert len(other.cached_blocks) == 0  # when it was made


def test_the_block_of_the_last_prompt_token_stays_private_when_others_have_it(handoff):
    one, other = prefilling(handoff, 1, range(8)), prefilling(handoff, 2, range(8))
    handoff.share_prompt(one.key, 8)
    assert handoff.catch_up(other.key, 0) == 4
    assert handoff.ledger.state(other.blocks[1]) is B.OWNED


# ---- prefix caching


def chain_of(*tokens: int) -> PrefixChain:
    chain = PrefixChain(ROOT, LAYOUT.block_size)
    chain.extend(tokens)
    return chain


def reserve_for(handoff: HandOff, number: int, prompt: range, answer: int = 2) -> Reservation:
    params = sampling(max_tokens=answer)
    return handoff.reserve(("router", number), len(prompt), params, 0, chain_of(*prompt))


def decoding(handoff: HandOff, number: int, prompt: range, answer: int = 2) -> Reservation:
    reservation = reserve_for(handoff, number, prompt, answer)
    begin(handoff, reservation)
    receive(handoff, reservation)
    handoff.commit(reservation.transfer_id, len(reservation.prompt_blocks))
    handoff.share_prompt(reservation.key)
    return reservation


def served(handoff: HandOff, number: int, prompt: range, *answer: int) -> Reservation:
    reservation = decoding(handoff, number, prompt, max(2, len(answer)))
    handoff.finish(reservation.key, answer)
    return reservation


def cached_for(handoff: HandOff, tokens: range | list[int]) -> int:
    return len(handoff.cache.match(chain_of(*tokens).hashes))


def test_the_full_blocks_of_a_prompt_stay_and_the_rest_is_free(handoff):
    served(handoff, 1, range(10), 50, 51)
    assert counts(handoff) == {B.CACHED: 2, B.FREE: TOTAL - 2}
    assert handoff.ledger.available == TOTAL


def test_only_what_is_not_cached_is_reserved_and_sent(handoff):
    first = served(handoff, 1, range(10), 50)
    second = decoding(handoff, 2, range(11))
    assert second.cached_blocks == first.blocks[:2]
    assert len(second.prompt_blocks) == 1
    assert not set(second.prompt_blocks + second.growth_blocks) & set(second.cached_blocks)
    assert second.blocks == second.cached_blocks + second.prompt_blocks + second.growth_blocks


def test_a_prompt_that_is_cached_as_a_whole_still_needs_a_commit(handoff):
    served(handoff, 1, range(8), 50)
    reservation = reserve_for(handoff, 2, range(8))
    assert (len(reservation.cached_blocks), reservation.prompt_blocks) == (2, [])
    begin(handoff, reservation)
    assert handoff.commit(reservation.transfer_id, 0) is reservation
    assert reservation.state is S.DECODING


def test_the_answer_is_cached_but_for_what_its_last_token_would_fill(handoff):
    served(handoff, 1, range(6), 50, 51, 52, 53, 54, 55)
    # Positions 6 to 10 have KV: the sixth token was never read back.
    assert cached_for(handoff, [*range(6), 50, 51, 52, 53, 54, 55]) == 2
    assert counts(handoff) == {B.CACHED: 2, B.FREE: TOTAL - 2}


def test_the_answer_to_a_prompt_without_a_full_block_is_cached_too(handoff):
    served(handoff, 1, range(2), 50, 51, 52)
    assert cached_for(handoff, [0, 1, 50, 51]) == 1
    assert cached_for(handoff, [0, 1, 50, 52]) == 0


def test_the_next_turn_of_a_chat_finds_prompt_and_answer(handoff):
    served(handoff, 1, range(6), *range(6, 12))
    assert len(decoding(handoff, 2, range(14)).cached_blocks) == 2


def test_running_requests_share_a_prefix(handoff):
    one, other = decoding(handoff, 1, range(10)), decoding(handoff, 2, range(9))
    assert other.cached_blocks == one.blocks[:2]
    assert counts(handoff) == {B.CACHED: 2, B.OWNED: 2, B.FREE: TOTAL - 4}
    handoff.finish(one.key, [50])
    assert handoff.ledger.available == TOTAL - 3
    handoff.finish(other.key, [50])
    assert handoff.ledger.available == TOTAL


def test_of_two_equal_prompts_received_at_once_one_is_kept(handoff):
    both = [reserve_for(handoff, number, range(8), 1) for number in (1, 2)]
    for r in both:
        begin(handoff, r)
        receive(handoff, r)
        handoff.commit(r.transfer_id, 2)
        handoff.share_prompt(r.key)
    assert counts(handoff) == {B.CACHED: 2, B.OWNED: 2, B.FREE: TOTAL - 4}
    for r in both:
        handoff.finish(r.key, [50])
    assert counts(handoff) == {B.CACHED: 2, B.FREE: TOTAL - 2}


def test_nothing_is_shared_before_the_engine_can_read_it(handoff):
    reservation = reserve_for(handoff, 1, range(8))
    begin(handoff, reservation)
    receive(handoff, reservation)
    handoff.commit(reservation.transfer_id, 2)
    assert cached_for(handoff, range(8)) == 0
    handoff.share_prompt(reservation.key)
    assert cached_for(handoff, range(8)) == 2


def test_an_abort_while_receiving_drops_the_shares_and_quarantines_the_rest(handoff):
    served(handoff, 1, range(8), 50)
    reservation = reserve_for(handoff, 2, range(12))
    begin(handoff, reservation)
    assert handoff.abort(reservation.key, E.CANCEL) == reservation.transfer_id
    assert counts(handoff) == {B.CACHED: 2, B.QUARANTINED: 1, B.FREE: TOTAL - 3}
    assert handoff.ledger.available == TOTAL - 1
    handoff.writer_lost(reservation.transfer_id)
    assert handoff.ledger.available == TOTAL
    assert cached_for(handoff, range(12)) == 2


def test_a_writer_lost_while_receiving_drops_the_shares(handoff):
    served(handoff, 1, range(8), 50)
    reservation = reserve_for(handoff, 2, range(12))
    begin(handoff, reservation)
    assert handoff.writer_lost(reservation.transfer_id) is reservation
    assert counts(handoff) == {B.CACHED: 2, B.FREE: TOTAL - 2}
    assert handoff.ledger.available == TOTAL


@pytest.mark.parametrize("in_step", [False, True])
def test_an_abort_while_decoding_keeps_what_is_complete(handoff, in_step):
    reservation = decoding(handoff, 1, range(6), 9)
    handoff.abort(reservation.key, E.CANCEL, [50, 51, 52, 53], in_step=in_step)
    # A step writes position 9, in the third block.
    assert cached_for(handoff, [*range(6), 50, 51, 52, 53]) == 2
    if in_step:
        assert counts(handoff) == {B.CACHED: 2, B.QUARANTINED: 2, B.FREE: TOTAL - 4}
        assert handoff.ledger.available == TOTAL - 4, "the step may still read them"
        handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.CACHED: 2, B.FREE: TOTAL - 2}
    assert handoff.ledger.available == TOTAL


def test_an_abort_before_the_engine_can_read_the_prompt_keeps_nothing(handoff):
    reservation = reserve_for(handoff, 1, range(8))
    begin(handoff, reservation)
    receive(handoff, reservation)
    handoff.commit(reservation.transfer_id, 2)
    handoff.abort(reservation.key, E.CANCEL, in_step=True)
    handoff.engine_idle(reservation.key)
    assert counts(handoff) == {B.FREE: TOTAL}


def test_what_is_distrusted_is_found_no_more(handoff):
    served(handoff, 1, range(8), 50)
    one, other = decoding(handoff, 2, range(10)), decoding(handoff, 3, range(9))
    handoff.distrust(one.key)
    handoff.abort(one.key, E.CANCEL, [50, 51, 52])
    handoff.finish(other.key, [50, 51, 52, 53, 54])
    handoff.distrust(other.key)  # has ended already
    assert counts(handoff) == {B.FREE: TOTAL}


def test_cached_blocks_make_room(handoff):
    served(handoff, 1, range(24), 50)
    assert handoff.ledger.free == 2
    reservation = reserve_for(handoff, 2, range(100, 116))
    assert len(reservation.blocks) == 5
    assert cached_for(handoff, range(24)) == 3


def test_a_chain_over_another_number_of_tokens_is_refused(handoff):
    with pytest.raises(InvalidReservationError, match="block hashes for 8 tokens, not for 9"):
        handoff.reserve(KEY, 9, sampling(max_tokens=1), 0, chain_of(*range(8)))
    assert len(handoff) == 0


# ---- all of it at random

# Prompts are beginnings of these, so they share prefixes of every length.
TEXTS = [[1] * 14, [1] * 6 + [2] * 8]
BLOCKS = 12


def has(state: ReservationState) -> Callable[["HandOffMachine"], bool]:
    return lambda machine: any(r.state is state for r in machine.live.values())


class HandOffMachine(RuleBasedStateMachine):
    """Routers, writers, the engine and the clock, in any order.

    `writing` and `stepping` are the truth about who may touch which blocks; `pool` about which
    token's KV is in which slot of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[list[int]] = [[0] * LAYOUT.block_size for _ in range(BLOCKS)]
        self.meaning: dict[bytes, list[int]] = {}  # the tokens of a block of that name
        self.prompts: dict[Key, list[int]] = {}
        self.answers: dict[Key, list[int]] = {}  # of those decoding
        self.ledger = BlockLedger(BLOCKS)
        self.handoff = HandOff(
            LAYOUT, self.ledger, lease_ms=LEASE_MS, reservations_max=5, resends_max=RESENDS_MAX
        )
        self.now = 0.0
        self.number = 0
        self.live: dict[Key, Reservation] = {}
        self.writing: dict[int, Reservation] = {}
        self.stepping: dict[Key, Reservation] = {}
        self.computed: dict[Key, int] = {}  # tokens, of those prefilling
        self.chunks: dict[Key, int] = {}  # tokens, of those prefilling and stepping

    def pick(self, data: st.DataObject, *states: ReservationState) -> Reservation | None:
        some = [r for r in self.live.values() if not states or r.state in states]
        return data.draw(st.sampled_from(some)) if some else None

    def pick_writer(self, data: st.DataObject) -> Reservation | None:
        return data.draw(st.sampled_from(list(self.writing.values()))) if self.writing else None

    def name(self, tokens: list[int]) -> PrefixChain:
        chain = chain_of(*tokens)
        for index, name in enumerate(chain.hashes):
            self.meaning[name] = tokens[index * LAYOUT.block_size :][: LAYOUT.block_size]
        return chain

    def in_pool(self, r: Reservation, count: int) -> list[int]:
        """The tokens at the first `count` positions of its blocks."""
        return [token for block in r.blocks for token in self.pool[block]][:count]

    @rule(
        text=st.sampled_from(TEXTS),
        length=st.integers(1, 14),
        answer=st.integers(1, 7),
        caching=st.sampled_from([True, True, True, False]),
        here=st.booleans(),
    )
    def reserve(self, text: list[int], length: int, answer: int, caching: bool, here: bool) -> None:
        self.number += 1
        key, prompt = ("router", self.number), text[:length]
        chain = self.name(prompt) if caching else None
        try:
            r = self.handoff.reserve(
                key, length, sampling(max_tokens=answer), self.now, chain, prefill_here=here
            )
        except (OutOfBlocksError, InvalidReservationError):
            return
        assert (
            self.in_pool(r, len(r.cached_blocks) * LAYOUT.block_size)
            == prompt[: len(r.cached_blocks) * LAYOUT.block_size]
        )
        for other in (*self.live.values(), *self.writing.values(), *self.stepping.values()):
            if other.state is not S.CLOSED:
                held = other.blocks
                if other.state is S.REVOKING:
                    held = other.prompt_blocks
                private = r.prompt_blocks + r.growth_blocks
                assert not set(private) & set(held), "a block in use was given away"
        self.live[key] = r
        self.prompts[key] = prompt
        if here:
            self.handoff.claim_for_engine(key)
            self.computed[key] = len(r.cached_blocks) * LAYOUT.block_size
            assert self.computed[key] < length

    @precondition(has(S.RESERVED))
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if r := self.pick(data, S.RESERVED):
            begin(self.handoff, r, self.now)
            self.writing[r.transfer_id] = r

    @precondition(lambda self: bool(self.writing))
    @rule(data=st.data(), count=st.integers(1, 3))
    def blocks(self, data: st.DataObject, count: int) -> None:
        if r := self.pick_writer(data):
            end = min(r.blocks_received + count, len(r.prompt_blocks))
            sent = st.integers(r.blocks_received, max(r.blocks_received, end - 1))
            bad = data.draw(st.sets(sent)) if end > r.blocks_received else set()
            self.receive(r, count, sorted(bad))

    @precondition(lambda self: bool(self.writing))
    @rule(data=st.data(), good=st.booleans())
    def again(self, data: st.DataObject, good: bool) -> None:
        if (r := self.pick_writer(data)) and r.bad_blocks:
            index = data.draw(st.sampled_from(sorted(r.bad_blocks)))
            targets = self.handoff.expect(r.transfer_id, index, 1, again=True)
            assert list(targets) == [r.prompt_blocks[index]]
            self.write(r, index)
            try:
                self.handoff.received(r.transfer_id, index, 1, () if good else (index,), self.now)
            except RefusedError:
                assert r.resends[index] > RESENDS_MAX
            assert (index in r.bad_blocks) == (not good)

    def receive(self, r: Reservation, count: int, bad: Sequence[int] = ()) -> None:
        first = r.blocks_received
        try:
            targets = self.handoff.expect(r.transfer_id, first, count)
        except RefusedError:
            assert first + count > len(r.prompt_blocks)
        else:
            assert list(targets) == r.prompt_blocks[first : first + count]
            for index in range(first, first + count):
                if index not in bad:
                    self.write(r, index)
            self.handoff.received(r.transfer_id, first, count, bad, self.now)

    def write(self, r: Reservation, index: int) -> None:
        """The index-th block of the ticket arrives."""
        size, place = LAYOUT.block_size, len(r.cached_blocks) + index
        tokens = self.prompts[r.key][place * size : (place + 1) * size]
        self.pool[r.prompt_blocks[index]] = tokens + [0] * (size - len(tokens))

    @precondition(has(S.RESERVED))
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        """A transfer from its begin to its commit, with nothing in between."""
        if r := self.pick(data, S.RESERVED):
            begin(self.handoff, r, self.now)
            self.writing[r.transfer_id] = r
            if r.prompt_blocks:
                self.receive(r, len(r.prompt_blocks))
            self.commit_one(r)

    @precondition(lambda self: bool(self.writing))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if r := self.pick_writer(data):
            self.commit_one(r)

    def commit_one(self, r: Reservation) -> None:
        complete = r.blocks_received == len(r.prompt_blocks) and not r.bad_blocks
        aborting = r.state is S.REVOKING
        try:
            committed = self.handoff.commit(r.transfer_id, len(r.prompt_blocks))
        except RefusedError:
            assert not complete
            return
        assert (committed is None) == aborting
        if committed is not None:
            assert complete
            del self.writing[r.transfer_id]
            self.handoff.share_prompt(r.key)
            self.answers[r.key] = [7]

    @precondition(has(S.DECODING))
    @rule(data=st.data())
    def step_begins(self, data: st.DataObject) -> None:
        r = self.pick(data, S.DECODING)
        if r and r.key not in self.stepping and len(self.answers[r.key]) < r.sampling.max_tokens:
            self.stepping[r.key] = r
            self.compute(r)

    def compute(self, r: Reservation) -> None:
        """Reads all that came before and writes the newest token's KV, at any time of a step."""
        written = self.prompts[r.key] + self.answers[r.key][:-1]
        assert self.in_pool(r, len(written)) == written, "the engine reads what is not its own"
        index, slot = divmod(len(written), LAYOUT.block_size)
        block = r.blocks[index]
        assert self.ledger.state(block) in (B.OWNED, B.QUARANTINED), "a shared block is written"
        self.pool[block][slot] = self.answers[r.key][-1]

    @precondition(has(S.PREFILLING))
    @rule(data=st.data(), count=st.integers(1, 9))
    def chunk_begins(self, data: st.DataObject, count: int) -> None:
        r = self.pick(data, S.PREFILLING)
        if r and r.key not in self.stepping:
            self.catch_up(r)
            self.stepping[r.key] = r
            self.chunks[r.key] = min(count, r.prompt_tokens - self.computed[r.key])
            self.compute_chunk(r)

    def catch_up(self, r: Reservation) -> None:
        if self.computed[r.key] % LAYOUT.block_size == 0:
            found = self.handoff.catch_up(r.key, self.computed[r.key])
            assert found % LAYOUT.block_size == 0
            self.computed[r.key] += found
            assert self.computed[r.key] < r.prompt_tokens

    def compute_chunk(self, r: Reservation) -> None:
        start, prompt = self.computed[r.key], self.prompts[r.key]
        assert self.in_pool(r, start) == prompt[:start], "the engine reads what is not its own"
        for place in range(start, start + self.chunks[r.key]):
            index, slot = divmod(place, LAYOUT.block_size)
            block = r.blocks[index]
            assert self.ledger.state(block) in (B.OWNED, B.QUARANTINED), "a shared block is written"
            self.pool[block][slot] = prompt[place]

    @precondition(lambda self: bool(self.chunks))
    @rule(data=st.data())
    def chunk_ends(self, data: st.DataObject) -> None:
        if self.chunks:
            r = self.stepping.pop(data.draw(st.sampled_from(list(self.chunks))))
            self.compute_chunk(r)
            self.computed[r.key] += self.chunks.pop(r.key)
            self.handoff.engine_moved(self.now)
            if self.handoff.is_aborting(r.key):
                self.handoff.engine_idle(r.key)
                self.live.pop(r.key)
                return
            self.handoff.share_prompt(r.key, self.computed[r.key])
            if self.computed[r.key] == r.prompt_tokens:
                self.handoff.computed(r.key)
                self.answers[r.key] = [7]

    @precondition(lambda self: len(self.stepping) > len(self.chunks))
    @rule(data=st.data(), token=st.integers(7, 8))
    def step_ends(self, data: st.DataObject, token: int) -> None:
        decoding = [key for key in self.stepping if key not in self.chunks]
        if decoding:
            r = self.stepping.pop(data.draw(st.sampled_from(decoding)))
            self.compute(r)
            if self.handoff.is_aborting(r.key):
                self.handoff.engine_idle(r.key)
                self.live.pop(r.key)
            else:
                self.append(r, token)

    def append(self, r: Reservation, token: int) -> None:
        self.answers[r.key].append(token)
        self.name(self.prompts[r.key] + self.answers[r.key])

    @precondition(has(S.DECODING))
    @rule(data=st.data(), steps=st.integers(1, 8), token=st.integers(7, 8))
    def several_steps(self, data: st.DataObject, steps: int, token: int) -> None:
        r = self.pick(data, S.DECODING)
        if r and r.key not in self.stepping:
            for _ in range(min(steps, r.sampling.max_tokens - len(self.answers[r.key]))):
                self.compute(r)
                self.append(r, token)

    @precondition(has(S.DECODING))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if (r := self.pick(data, S.DECODING)) and r.key not in self.stepping:
            self.handoff.finish(r.key, self.answers[r.key])
            del self.live[r.key]

    @precondition(has(S.DECODING))
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        if (r := self.pick(data, S.DECODING)) and data.draw(st.integers(0, 3)) == 0:
            hashes = r.hashes
            self.handoff.distrust(r.key)
            assert self.handoff.cache.match(hashes) == []

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data(), why=st.sampled_from([E.CANCEL, E.TIMEOUT]))
    def abort(self, data: st.DataObject, why: ReservationEvent) -> None:
        if r := self.pick(data):
            self.abort_one(r, why)

    def abort_one(self, r: Reservation, why: ReservationEvent) -> None:
        answer = self.answers.get(r.key, ())
        told = self.handoff.abort(r.key, why, answer, in_step=r.key in self.stepping)
        assert told is None or told in self.writing
        if r.state is S.CLOSED:
            del self.live[r.key]

    @precondition(lambda self: bool(self.writing))
    @rule(data=st.data())
    def writer_lost(self, data: st.DataObject) -> None:
        if r := self.pick_writer(data):
            news = r.state is S.RECEIVING
            assert (self.handoff.writer_lost(r.transfer_id) is r) == news
            del self.writing[r.transfer_id]
            del self.live[r.key]

    @rule(keep=st.booleans(), chance=st.integers(0, 9))
    def router_lost(self, keep: bool, chance: int) -> None:
        if chance:
            return
        decoding = [key for key, r in self.live.items() if r.state is S.DECODING]
        for key in self.handoff.session_ended("router"):
            self.abort_one(self.live[key], E.ROUTER_LOST)
        for key in [] if keep else decoding:
            self.abort_one(self.live[key], E.TIMEOUT)

    @rule(ms=st.integers(0, LEASE_MS // 8))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        for key in self.handoff.expired(self.now):
            self.abort_one(self.live[key], E.TIMEOUT)
        assert self.handoff.expired(self.now) == []

    @invariant()
    def the_ledger_balances(self) -> None:
        self.handoff.cache.check()
        assert len(self.handoff) == len(self.live)

    @invariant()
    def what_somebody_may_write_is_neither_free_nor_cached(self) -> None:
        private = self.handoff.cache.private
        held = [b for r in self.writing.values() for b in r.prompt_blocks]
        held += [b for r in self.stepping.values() for b in private(r.blocks)]
        assert len(held) == len(set(held)), "a block is in two live reservations"
        assert {self.ledger.state(b) for b in held} <= {B.WRITING, B.OWNED, B.QUARANTINED}
        used = {b for r in self.stepping.values() for b in r.blocks}
        assert self.ledger.available <= BLOCKS - len(used.union(held))

    @invariant()
    def every_cached_block_holds_what_its_name_says(self) -> None:
        for name, block in self.handoff.cache._block_of.items():
            assert self.pool[block] == self.meaning[name]

    def teardown(self) -> None:
        for r in list(self.live.values()):
            self.handoff.abort(r.key, E.CANCEL, in_step=r.key in self.stepping)
        for transfer_id in self.writing:
            self.handoff.writer_lost(transfer_id)
        for key in self.stepping:
            if self.handoff.is_aborting(key):
                self.handoff.engine_idle(key)
        self.handoff.cache.check()
        assert self.ledger.available == BLOCKS
        assert len(self.handoff) == 0


TestHandOffMachine = HandOffMachine.TestCase
TestHandOffMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
