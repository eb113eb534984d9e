"""The dispatcher driven event by event. What becomes of lost workers: test_recovery.py."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from dispatcher_bench import EOS, EXHAUSTED, PEER_LOST, Bench, Client, S, make
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv.prefix import PrefixChain, chain_root
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.wire import transfer_pb2
from kvrelay.wire import worker_pb2 as pb
from router.commands import (
    DeadlineError,
    DuplicateRequestError,
    ExhaustedTrouble,
    InvalidTrouble,
    QueueFullError,
    ToDecode,
    ToPrefill,
    UnavailableTrouble,
)
from router.request import (
    TRANSITIONS,
    Ending,
    Request,
    RequestEvent,
)


def names(value: object) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, RequestEvent)), ids=names)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    request = make()
    request.state = state
    if (state, event) in TRANSITIONS:
        request.on(event)
        assert request.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            request.on(event)
        assert request.state is state


# ---- one request when all goes well


def test_a_request_goes_from_reserve_to_prefill_to_its_tokens_to_its_end():
    bench = Bench()
    request = bench.submit(prompt=8, max_tokens=3)
    ((worker, reserve),) = bench.reserves()
    assert (worker, reserve.request_id, reserve.attempt) == ("d1", "r1", 1)
    assert (reserve.prompt_tokens, reserve.sampling.max_tokens) == (8, 3)
    bench.reserved(request)
    ((worker, prefill),) = bench.prefills()
    assert (worker, prefill.key, prefill.ticket.request_id) == ("p1", reserve.key, "r1")
    assert list(prefill.prompt_token_ids) == request.prompt
    bench.first_token(request, 10)
    assert bench.seen(request) == [10]  # before the decode worker has said a word
    bench.step(request, 0, 10)
    bench.handed_off(request)
    bench.step(request, 1, 11)
    bench.step(request, 2, 12, ending=2)
    assert bench.seen(request) == [10, 11, 12]
    assert bench.end(request) is Ending.LENGTH
    assert bench.cancels() == []
    assert len(bench.dispatcher) == 0


def names_of(prompt: Sequence[int], tenant: str = "") -> PrefixChain:
    chain = PrefixChain(chain_root("m", 4, tenant), 4)
    chain.extend(prompt)
    return chain


def test_both_workers_are_told_the_names_of_the_prompts_full_blocks():
    bench = Bench()
    request = bench.submit(prompt=10)
    bench.reserved(request)
    chain = names_of(range(10))
    ((_, reserve),) = bench.reserves()
    ((_, prefill),) = bench.prefills()
    assert reserve.block_hashes == prefill.block_hashes == b"".join(chain.hashes)
    assert (reserve.hash_root, list(reserve.tail_token_ids)) == (chain.root, [8, 9])


def test_a_retry_names_the_answer_so_far_too():
    bench = Bench("p1", "d1", "d2")
    request = bench.bring(bench.submit(prompt=7, max_tokens=9), S.DECODING)
    bench.d_fails(request)
    bench.reserved(request)
    chain = names_of([*range(7), 10, 11])
    _, (_, reserve) = bench.reserves()
    _, (_, prefill) = bench.prefills()
    assert reserve.block_hashes == prefill.block_hashes == b"".join(chain.hashes)
    assert list(reserve.tail_token_ids) == [11]
    assert list(prefill.prompt_token_ids) == [*range(7), 10, 11]


def test_tenants_share_no_names():
    bench = Bench()
    one, other = make("r1"), make("r2")
    other.tenant = "other"
    for request in (one, other):
        bench.clients[request] = Client()
        bench.take(bench.dispatcher.submit(request))
    (_, first), (_, second) = bench.reserves()
    assert first.block_hashes == b"".join(names_of(range(8)).hashes)
    assert second.block_hashes == b"".join(names_of(range(8), "other").hashes)
    assert first.hash_root != second.hash_root


@pytest.mark.parametrize(("attempts", "cached"), [([6], 6), ([6, 3], 3), ([2, 5], 2), ([0, 5], 0)])
def test_cached_tokens_are_those_that_no_attempt_has_computed(attempts, cached):
    bench = Bench("p1", "d1", "d2")
    request = bench.submit(prompt=8)
    for tokens in attempts:
        if request.times.prefill_began_at_ms is not None:
            bench.p_fails(request)
        bench.bring(request, S.PREFILLING)
        bench.p(started=pb.PrefillStarted(key=request.key, cached_tokens=tokens))
    assert request.times.cached_tokens == cached


@pytest.mark.parametrize(
    ("attempts", "cached"),
    [([(2, 6)], 6), ([(2, 0)], 2), ([(1, None), (3, 5)], 1), ([(5, None), (2, 4)], 4)],
)
def test_what_others_computed_after_the_start_counts_as_cached(attempts, cached):
    bench = Bench("p1", "d1", "d2")
    request = bench.submit(prompt=8)
    for started, at_first_token in attempts:
        if request.times.prefill_began_at_ms is not None:
            bench.p_fails(request)
        bench.bring(request, S.PREFILLING)
        bench.p(started=pb.PrefillStarted(key=request.key, cached_tokens=started))
        if at_first_token is not None:
            token = pb.FirstToken(key=request.key, token_id=7, cached_tokens=at_first_token)
            bench.p(first_token=token)
    assert request.times.cached_tokens == cached


def test_the_first_token_is_delivered_once_whoever_names_it_first():
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.step(request, 0, 10)
    assert bench.seen(request) == [10]
    bench.first_token(request, 10)
    assert bench.seen(request) == [10]


def test_an_answer_is_finished_only_after_its_ending_and_its_hand_off():
    bench = Bench()
    one = bench.bring(bench.submit("r1"), S.DECODING)
    bench.handed_off(one)
    assert bench.end(one) is None
    bench.step(one, 2, EOS, ending=1)
    assert bench.end(one) is Ending.EOS
    other = bench.bring(bench.submit("r2"), S.DECODING)
    bench.step(other, 2, EOS, ending=1)
    assert bench.end(other) is None
    bench.handed_off(other, kv_bytes=7, transport="shm")
    assert bench.end(other) is Ending.EOS
    assert (other.times.kv_bytes, other.times.transport) == (7, "shm")


def test_times_are_those_of_the_first_and_the_last_token():
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.now = 5
    bench.p(started=pb.PrefillStarted(key=request.key))
    bench.now = 9
    bench.first_token(request, 10)
    bench.now = 12
    bench.step(request, 0, 10)  # known: no news
    assert request.times.last_token_at_ms == 9
    bench.step(request, 1, 11)
    times = request.times
    assert (times.prefill_began_at_ms, times.first_token_at_ms, times.last_token_at_ms) == (
        5,
        9,
        12,
    )


# ---- the decode worker computes the prompt itself


def test_without_prefill_workers_the_decode_worker_computes_the_prompt():
    bench = Bench("d1")
    request = bench.submit(prompt=10, max_tokens=3)
    ((worker, reserve),) = bench.reserves()
    assert (worker, reserve.prefill_here, reserve.prompt_tokens) == ("d1", True, 10)
    assert list(reserve.prompt_token_ids) == list(range(10))
    bench.reserved(request)
    assert (request.state, bench.prefills()) == (S.PREFILLING, [])
    bench.now = 3
    bench.d(started=pb.PrefillStarted(key=request.key, cached_tokens=4))
    bench.now = 5
    bench.first_token(request, 10, prefill_ms=2.5)
    assert bench.seen(request) == [10]
    bench.step(request, 0, 10)
    bench.step(request, 1, 11)
    bench.step(request, 2, 12, ending=2)
    assert (bench.seen(request), bench.end(request)) == ([10, 11, 12], Ending.LENGTH)
    times = request.times
    assert (times.prefill_began_at_ms, times.first_token_at_ms) == (3, 5)
    assert (times.prefill_ms, times.transport, times.kv_bytes) == (2.5, "local", 0)
    assert times.cached_tokens == 4
    assert (bench.cancels(), len(bench.dispatcher)) == ([], 0)


def test_a_reservation_has_all_that_another_router_would_need():
    bench = Bench()
    request = bench.submit(prompt=8, max_tokens=6, priority=-3, min_tokens=2)
    request.tenant = "somebody"
    bench.bring(request, S.DECODING)
    bench.d_fails(request)
    reserve = bench.reserves()[-1][1]
    assert (reserve.prefill_here, reserve.answered, reserve.min_tokens) == (False, 2, 2)
    assert list(reserve.prompt_token_ids) == [*range(8), 10, 11]
    assert (reserve.tenant, reserve.priority, list(reserve.stop)) == ("somebody", -3, [])


def test_a_first_token_of_its_own_may_be_the_whole_answer():
    bench = Bench("d1")
    request = bench.submit(max_tokens=1)
    bench.reserved(request)
    bench.first_token(request, 10)
    bench.step(request, 0, 10, ending=2)
    assert (bench.seen(request), bench.end(request)) == ([10], Ending.LENGTH)


def test_a_prompt_computed_at_the_decode_worker_survives_prefill_workers_that_come_and_go():
    bench = Bench("d1")
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.up("p1")
    bench.down("p1")
    assert (request.state, request.attempt) == (S.PREFILLING, 1)


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING, S.DECODING], ids=names)
def test_a_decode_worker_lost_with_the_prompt_is_replaced_without_gap(state):
    bench = Bench("d1")
    request = bench.bring(bench.submit(max_tokens=5), state)
    seen = list(bench.seen(request))
    bench.down("d1")
    assert (request.state, bench.cancels()) == (S.QUEUED, [])
    bench.up("d2")
    worker, reserve = bench.reserves()[-1]
    assert (worker, reserve.attempt, reserve.prefill_here) == ("d2", 2, True)
    assert list(reserve.prompt_token_ids) == [*request.prompt, *seen]


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING, S.DECODING], ids=names)
def test_letting_go_of_a_prompt_at_the_decode_worker_tells_it_alone(state):
    bench = Bench("d1")
    request = bench.bring(bench.submit(), state)
    bench.let_go(request)
    assert bench.cancels() == [("d1", request.key)]


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING, S.DECODING], ids=names)
def test_a_failure_at_the_decode_worker_that_had_the_prompt_is_tried_again(state):
    bench = Bench("d1", attempts_max=2)
    request = bench.bring(bench.submit(), state)
    bench.d_fails(request)
    assert (request.state, request.attempt) == (S.RESERVING, 2)
    bench.d_fails(request)
    assert isinstance(bench.end(request), UnavailableTrouble)


def test_no_room_for_a_prompt_at_the_decode_worker_is_no_attempt():
    bench = Bench("d1", attempts_max=1)
    request = bench.submit()
    bench.d_fails(request, EXHAUSTED, free=0)
    assert (request.state, request.attempt) == (S.QUEUED, 0)
    bench.d()
    assert (request.state, request.attempt) == (S.RESERVING, 1)


def test_what_the_decode_worker_cannot_compute_fails_at_once():
    bench = Bench("d1")
    request = bench.submit()
    bench.d_fails(request, pb.FAILURE_CODE_INVALID)
    assert isinstance(bench.end(request), InvalidTrouble)
    assert len(bench.dispatcher) == 0


# ---- the queue


def test_requests_wait_without_workers_and_go_when_they_come():
    bench = Bench("p1")
    request = bench.submit()
    assert request.state is S.QUEUED
    bench.up("d1")
    assert request.state is S.RESERVING


def test_a_running_id_is_not_taken_again_until_it_has_ended():
    bench = Bench()
    request = bench.submit("same")
    with pytest.raises(DuplicateRequestError, match="same"):
        bench.submit("same")
    bench.let_go(request)
    bench.submit("same")


def test_an_id_is_its_tenants_own():
    bench = Bench("p1")
    ours, theirs, again = make("same"), make("same"), make("same")
    ours.tenant, theirs.tenant, again.tenant = "alice", "bob", "bob"
    for request in (ours, theirs):
        bench.dispatcher.submit(request)
    with pytest.raises(DuplicateRequestError, match="same"):
        bench.dispatcher.submit(again)
    bench.dispatcher.let_go(theirs)
    assert len(bench.dispatcher) == 1
    bench.dispatcher.submit(again)
    bench.dispatcher.check()


def test_a_full_queue_is_a_typed_refusal_and_changes_nothing():
    bench = Bench("p1", queue_max=2)
    bench.submit("r1")
    first_two = [bench.submit("r2"), len(bench.dispatcher)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        bench.submit("r3")
    assert len(bench.dispatcher) == first_two[1] == 2


def test_letting_go_of_a_request_that_was_never_accepted_changes_nothing():
    bench = Bench("p1", queue_max=1)
    waiting = bench.submit("same")
    for refusal, name in ((DuplicateRequestError, "same"), (QueueFullError, "other")):
        refused = make(name)
        with pytest.raises(refusal):
            bench.dispatcher.submit(refused)
        assert bench.dispatcher.let_go(refused) == []
    assert len(bench.dispatcher) == 1
    bench.up("d1")
    assert waiting.state is S.RESERVING


def test_a_request_without_room_is_overtaken_until_it_has_waited_long_enough():
    bench = Bench(blocks=10, queue_patience_ms=100)
    bench.d(free=3)
    large = bench.submit("large", prompt=30, max_tokens=8)
    bench.now = 100
    small = bench.submit("small", prompt=4, max_tokens=1)
    assert (large.state, small.state) == (S.QUEUED, S.RESERVING)
    bench.now = 101
    late = bench.submit("late", prompt=4, max_tokens=1)
    bench.d_fails(large, EXHAUSTED, free=3)
    assert (large.state, late.state) == (S.QUEUED, S.QUEUED)
    bench.d(free=11)  # one of them is on its way to `small`
    assert (large.state, late.state) == (S.RESERVING, S.QUEUED)
    bench.reserved(large, free=1)
    bench.reserved(small, free=1)
    assert late.state is S.RESERVING


def test_large_requests_however_many_do_not_hide_a_small_one():
    bench = Bench(blocks=10, queue_lookahead=2, queue_max=50)
    bench.d(free=2)
    large = [bench.submit(f"large{n}", prompt=30) for n in range(20)]
    small = bench.submit("small", prompt=4, max_tokens=1)
    assert {r.state for r in large} == {S.QUEUED}
    assert small.state is S.RESERVING


def test_only_so_many_are_placed_in_one_go():
    bench = Bench(queue_lookahead=2, queue_max=50, prefill_backlog_tokens=1000)
    bench.down("d1")
    requests = [bench.submit(f"r{n}") for n in range(5)]
    bench.dispatcher.decode_up("d1", bench.info("d1"))
    for placed in (2, 4, 5):
        assert bench.dispatcher.to_place
        bench.carry_out(bench.dispatcher.pump(0))
        assert [r.state for r in requests].count(S.RESERVING) == placed
    assert not bench.dispatcher.to_place


def test_events_place_nobody_and_one_look_does_for_many():
    bench = Bench(blocks=10)
    bench.d(free=0)
    waiting = bench.submit()
    assert not bench.dispatcher.to_place, "nothing has changed since it was tried"
    for free in (1, 2, 9):
        event = pb.DecodeEvent(load=pb.DecodeLoad(blocks_free=free))
        assert bench.dispatcher.on_decode_event("d1", event, 0) == []
    assert (waiting.state, bench.dispatcher.to_place) == (S.QUEUED, True)
    bench.carry_out(bench.dispatcher.pump(0))
    assert (waiting.state, bench.dispatcher.to_place) == (S.RESERVING, False)


def test_only_so_many_are_looked_at_past_a_request_without_room():
    bench = Bench(blocks=10, queue_scan_max=2)
    bench.d(free=2)
    large = [bench.submit(f"large{n}", prompt=30) for n in range(2)]
    small = bench.submit("small", prompt=4, max_tokens=1)
    assert {r.state for r in (*large, small)} == {S.QUEUED}
    bench.let_go(large[0])
    assert small.state is S.RESERVING


def test_one_worker_is_kept_for_who_has_waited_too_long_and_others_go_elsewhere():
    bench = Bench(
        "p1", "d1", "d2", "d3", blocks=20, queue_patience_ms=100, prefill_backlog_tokens=999
    )
    for worker, free in (("d1", 9), ("d2", 12), ("d3", 9)):
        bench.d(worker, free=free)
    large = bench.submit("large", prompt=60)
    bench.expire(101)
    bench.d_fails(large, EXHAUSTED, free=12)
    small = [bench.submit(f"r{n}", prompt=4, max_tokens=1) for n in range(4)]
    assert sorted(r.decode_id for r in small) == ["d1", "d1", "d3", "d3"]
    bench.d("d1", free=15)
    other = bench.submit("other", prompt=44)
    assert (large.state, other.decode_id) == (S.QUEUED, "d1")
    bench.d("d2", free=20)
    assert (large.state, large.decode_id) == (S.RESERVING, "d2")
    bench.reserved(large, free=5)
    assert bench.submit("last", prompt=4, max_tokens=1).decode_id == "d2", "kept no longer"


def test_a_decode_worker_that_is_kept_is_told_who_waits_for_room_there():
    """Other routers would take the room that this one leaves."""
    bench = Bench(blocks=10, queue_patience_ms=100)
    bench.d(free=5)
    large = bench.submit("large", prompt=36)
    bench.expire(101)
    ((worker, reserve),) = bench.reserves()
    assert (worker, reserve.key, large.state) == ("d1", large.key, S.RESERVING)
    bench.d_fails(large, EXHAUSTED, free=5)
    assert (large.state, large.attempt, bench.cancels()) == (S.QUEUED, 0, [])
    bench.expire(600)
    assert len(bench.reserves()) == 1, "once for each time that it is kept"


def test_a_worker_is_kept_for_a_while_and_then_the_others_pass_before_it_is_kept_again():
    bench = Bench(
        blocks=10, queue_patience_ms=100, queue_hold_ms=50, queue_hold_pause_ms=30, queue_max=50
    )
    bench.d(free=5)
    large = bench.submit("large", prompt=36)
    bench.expire(101)
    bench.d_fails(large, EXHAUSTED, free=5)
    for now, state in ((110, S.QUEUED), (150, S.QUEUED), (151, S.RESERVING), (180, S.RESERVING)):
        bench.expire(now)
        small = bench.submit(f"r{now}", prompt=4, max_tokens=1)
        assert small.state is state
        bench.let_go(small)
    bench.expire(181)
    bench.d_fails(large, EXHAUSTED, free=5)
    assert bench.submit("again", prompt=4, max_tokens=1).state is S.QUEUED
    bench.d(free=10)
    assert large.state is S.RESERVING


def test_a_kept_worker_that_is_lost_is_kept_no_longer():
    bench = Bench("p1", "d1", "d2", blocks=10, queue_patience_ms=100)
    bench.d("d2", free=3)
    bench.d("d1", free=5)
    large = bench.submit("large", prompt=36)
    bench.expire(101)
    bench.d_fails(large, EXHAUSTED, free=5)
    small = bench.submit("small", prompt=12, max_tokens=4)
    assert (large.state, small.state) == (S.QUEUED, S.QUEUED)
    bench.down("d1")
    bench.up("d1")
    assert (large.state, small.state) == (S.RESERVING, S.QUEUED)


def test_a_long_prompt_that_waits_for_a_busy_prefill_worker_has_it_kept():
    bench = Bench("p1", "d1", queue_patience_ms=100, prefill_backlog_tokens=50)
    bench.p(queued=20)
    long = bench.submit("long", prompt=40)
    bench.expire(100)
    assert bench.submit("r1", prompt=8).state is S.RESERVING
    bench.expire(101)
    assert bench.submit("r2", prompt=8).state is S.QUEUED
    bench.let_go(next(r for r in bench.clients if r.request_id == "r1"))
    bench.p(queued=0)
    assert long.state is S.RESERVING


def test_what_no_worker_holds_any_more_holds_up_nobody_however_long_it_waits():
    bench = Bench(queue_patience_ms=100)
    bench.down("d1")
    large = bench.submit("large", prompt=30)
    bench.blocks = 4
    bench.up("d2")
    bench.now = 1000
    small = bench.submit("small", prompt=4, max_tokens=1)
    assert (large.state, small.state) == (S.QUEUED, S.RESERVING)


def test_what_can_never_fit_fails_at_the_head_and_holds_up_nobody():
    bench = Bench("p1", blocks=10)  # 40 tokens
    long = bench.submit("long", prompt=38, max_tokens=3)
    fits = bench.submit("fits", prompt=37, max_tokens=3)
    assert (long.state, fits.state) == (S.QUEUED, S.QUEUED)  # who knows what will come
    bench.up("d1")
    assert isinstance(bench.end(long), InvalidTrouble)
    assert "may need 41 tokens, the workers hold 40" in str(bench.end(long))
    assert fits.state is S.RESERVING
    assert len(bench.dispatcher) == 1
    bench.let_go(long)
    bench.down("p1")
    bench.up("p1")
    later = bench.submit("later", prompt=99)  # admission would not let it in
    bench.d(free=10)
    assert isinstance(bench.end(later), InvalidTrouble)


def test_nothing_fails_for_being_long_while_there_is_no_decode_worker():
    bench = Bench(blocks=10)
    bench.down("d1")
    long = bench.submit(prompt=99)
    assert long.state is S.QUEUED
    bench.up("d2")
    assert isinstance(bench.end(long), InvalidTrouble), "d2 holds 40"


def test_a_request_waits_for_the_return_of_the_only_worker_that_could_hold_it():
    bench = Bench("p1", "d1", queue_wait_ms=100)
    bench.blocks = 2
    bench.up("d2")
    request = bench.bring(bench.submit(prompt=16), S.DECODING)
    assert request.decode_id == "d1"
    bench.down("d1")
    assert (request.state, bench.dispatcher.context_tokens) == (S.QUEUED, 8)
    waiting = bench.submit("waiting", prompt=16)
    bench.blocks = 100
    bench.up("d3")
    assert (request.decode_id, request.state) == ("d3", S.RESERVING)
    assert waiting.state is S.RESERVING


def test_blocks_asked_for_and_not_yet_answered_count_as_taken():
    bench = Bench(blocks=5)
    one = bench.submit("r1", prompt=8, max_tokens=4)  # 3 blocks
    two = bench.submit("r2", prompt=8, max_tokens=4)
    assert two.state is S.QUEUED
    bench.reserved(one, free=2)
    assert two.state is S.QUEUED
    bench.d(free=3)
    assert two.state is S.RESERVING


def test_prompts_under_way_to_a_prefill_worker_count_as_its_backlog():
    bench = Bench(prefill_backlog_tokens=20)
    one = bench.submit("r1", prompt=15)
    two = bench.submit("r2", prompt=15)
    assert (one.state, two.state) == (S.RESERVING, S.QUEUED)
    bench.reserved(one)
    bench.first_token(one, 10)  # computed: no backlog any more
    assert two.state is S.RESERVING


def test_requests_spread_over_the_workers():
    bench = Bench("p1", "p2", "d1", "d2")
    requests = [bench.submit(f"r{n}") for n in range(4)]
    assert sorted(r.prefill_id for r in requests) == ["p1", "p1", "p2", "p2"]
    assert sorted(r.decode_id for r in requests) == ["d1", "d1", "d2", "d2"]


def test_context_tokens_are_what_the_largest_decode_worker_holds():
    bench = Bench("p1")
    assert bench.dispatcher.context_tokens is None
    bench.blocks = 50
    bench.up("d1")
    assert bench.dispatcher.context_tokens == 200


# ---- workers are lost or fail


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING, S.DECODING], ids=names)
def test_a_lost_decode_worker_is_replaced_and_the_client_sees_no_gap(state):
    bench = Bench("p1", "d1")
    request = bench.bring(bench.submit(prompt=8, max_tokens=4), state)
    seen, key = list(bench.seen(request)), request.key
    bench.down("d1")
    assert request.state is S.QUEUED
    assert bench.cancels() == ([] if state is S.RESERVING else [("p1", key)])
    bench.up("d2")
    worker, reserve = bench.reserves()[-1]
    assert (worker, reserve.attempt) == ("d2", 2)
    assert reserve.prompt_tokens == 8 + len(seen)
    assert reserve.sampling.max_tokens == 4 - len(seen)
    assert reserve.key != key
    bench.reserved(request)
    assert list(bench.prefills()[-1][1].prompt_token_ids) == [*request.prompt, *seen]
    bench.first_token(request, 50)
    bench.step(request, 0, 50)
    bench.step(request, 1, 51)
    assert bench.seen(request) == [*seen, 50, 51]


def test_a_new_attempt_is_told_what_the_answer_has_and_what_it_still_needs():
    """So that penalties and min_tokens go on where the lost worker left them."""
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    bench = Bench("p1", "d1", strikes_max=9)
    request = bench.submit(prompt=8, max_tokens=6, min_p=0.125, min_tokens=3, **penalties)
    ((_, reserve),) = bench.reserves()
    told = {name: getattr(reserve.sampling, name) for name in penalties}
    assert (told, reserve.sampling.min_p) == (penalties, 0.125)
    assert (list(reserve.prompt_token_ids), reserve.answered) == (request.prompt, 0)
    assert reserve.sampling.min_tokens == 3
    bench.bring(request, S.DECODING)
    assert (bench.prefills()[-1][1].answered, len(bench.seen(request))) == (0, 2)

    bench.down("d1")
    bench.up("d2")
    _, reserve = bench.reserves()[-1]
    assert list(reserve.prompt_token_ids) == [*request.prompt, *bench.seen(request)]
    assert (reserve.answered, reserve.sampling.min_tokens) == (2, 1)
    bench.reserved(request)
    _, prefill = bench.prefills()[-1]
    assert (prefill.answered, prefill.sampling) == (2, reserve.sampling)
    bench.first_token(request, 50)
    bench.step(request, 0, 50)
    bench.step(request, 1, 51)

    bench.down("d2")
    bench.up("d3")
    _, reserve = bench.reserves()[-1]
    assert (reserve.answered, reserve.sampling.min_tokens) == (4, 0)


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING], ids=names)
def test_a_lost_prefill_worker_is_replaced_and_the_reservation_cancelled(state):
    bench = Bench("p1", "p2", "d1")
    request = bench.bring(bench.submit(), state)
    key = request.key
    bench.down("p1")
    assert (request.state, request.prefill_id) == (S.RESERVING, "p2")
    assert bench.cancels() == [("d1", key)]
    bench.reserved(request)
    assert bench.prefills()[-1][0] == "p2"


def test_a_prefill_worker_lost_after_its_first_token_loses_no_token():
    bench = Bench("p1", "p2", "d1")
    request = bench.bring(bench.submit(prompt=8), S.PREFILLING)
    bench.first_token(request, 10)
    bench.down("p1")
    assert bench.reserves()[-1][1].prompt_tokens == 9
    bench.reserved(request)
    bench.first_token(request, 11)
    assert bench.seen(request) == [10, 11]


@pytest.mark.parametrize("how", ["down", "failed"])
def test_a_prefill_worker_is_not_missed_once_the_decode_worker_has_the_kv(how):
    bench = Bench()
    request = bench.bring(bench.submit(), S.DECODING)
    if how == "down":
        bench.down("p1")
    else:
        bench.p_fails(request)
    assert request.state is S.DECODING
    bench.step(request, 2, EOS, ending=1)
    assert bench.end(request) is Ending.EOS
    assert bench.cancels() == []


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING, S.DECODING], ids=names)
def test_a_failure_at_the_decode_worker_is_tried_again(state):
    bench = Bench()
    request = bench.bring(bench.submit(), state)
    key = request.key
    bench.d_fails(request)
    assert request.state is S.RESERVING  # again
    assert (request.attempt, request.key) == (2, key + 1)


def test_a_failure_at_the_prefill_worker_is_tried_again():
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.p_fails(request)
    assert (request.state, request.attempt) == (S.RESERVING, 2)


def test_events_of_an_attempt_that_was_given_up_change_nothing():
    bench = Bench()
    request = bench.bring(bench.submit(), S.DECODING)
    old = request.key
    bench.d_fails(request)
    seen = list(bench.seen(request))
    bench.d(step=pb.StepOutput(outputs=[pb.SequenceOutput(key=old, offset=2, token_ids=[77])]))
    bench.d(reserved=pb.Reserved(key=old))
    bench.d(failed=pb.Failed(key=old, code=PEER_LOST))
    bench.p(first_token=pb.FirstToken(key=old, token_id=77))
    bench.p(failed=pb.Failed(key=old, code=PEER_LOST))
    bench.p(handed_off=pb.HandedOff(key=old))
    assert (request.state, request.attempt, bench.seen(request)) == (S.RESERVING, 2, seen)
    assert not request.prefill_settled


@pytest.mark.parametrize(("offset", "token"), [(0, 66), (1, 66), (3, 12)])
def test_a_token_that_contradicts_the_log_or_leaves_a_gap_is_tried_again(offset, token):
    bench = Bench()
    request = bench.bring(bench.submit(), S.DECODING)
    bench.step(request, offset, token)
    assert bench.seen(request) == [10, 11]
    assert (request.state, request.attempt) == (S.RESERVING, 2)


def test_workers_that_disagree_on_the_first_token_are_tried_again():
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.first_token(request, 10)
    bench.step(request, 0, 66)
    assert (request.state, request.attempt, bench.seen(request)) == (S.RESERVING, 2, [10])


def test_a_request_fails_after_attempts_max():
    bench = Bench(attempts_max=3)
    request = bench.submit()
    for _ in range(3):
        assert bench.end(request) is None
        bench.d_fails(request)
    trouble = bench.end(request)
    assert isinstance(trouble, UnavailableTrouble)
    assert "failed 3 times, last: boom" in str(trouble)
    assert len(bench.reserves()) == 3
    assert len(bench.dispatcher) == 0


def test_no_room_does_not_count_as_an_attempt():
    bench = Bench(attempts_max=1)
    request = bench.submit()
    for _ in range(5):
        bench.d_fails(request, EXHAUSTED, free=0)
        assert (request.state, request.attempt) == (S.QUEUED, 0)
        bench.d(free=100)
    assert (request.state, request.attempt) == (S.RESERVING, 1)


def test_no_room_at_the_prefill_worker_does_not_count_as_an_attempt_either():
    bench = Bench(attempts_max=1)
    request = bench.submit()
    for _ in range(5):
        bench.reserved(request)
        bench.p_fails(request, EXHAUSTED, queued=9)
        assert (request.state, request.attempt) == (S.QUEUED, 0)
        assert bench.cancels()[-1] == ("d1", request.key)
        bench.p()
    assert len(bench.cancels()) == 5, "who has refused is not told"
    assert (request.state, request.attempt) == (S.RESERVING, 1)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_had_no_room_is_not_asked_before_it_has_more(role):
    bench = Bench("p1", "d1", prefill_backlog_tokens=1000)
    one, two = bench.submit("r1"), bench.submit("r2")
    for request in (one, two):
        bench.bring(request, S.RESERVING if role == "decode" else S.PREFILLING)
    refuse = bench.d_fails if role == "decode" else bench.p_fails
    load = {"free": 90} if role == "decode" else {"queued": 9}
    refuse(one, EXHAUSTED, **load)  # though its load says that there is room
    refuse(two, EXHAUSTED, **load)
    assert {one.state, two.state} == {S.QUEUED}
    (bench.p if role == "decode" else bench.d)()  # the other one's word is nothing to it
    (bench.d if role == "decode" else bench.p)(**load)  # nor is it news to hear the same
    assert {one.state, two.state} == {S.QUEUED}
    assert bench.cancels() == ([] if role == "decode" else [("d1", 1), ("d1", 2)])
    (bench.d if role == "decode" else bench.p)()
    assert {one.state, two.state} == {S.RESERVING}


def test_a_prefill_worker_that_had_no_room_is_asked_again_after_its_next_hand_off():
    bench = Bench(prefill_backlog_tokens=1000)
    one, two = (bench.bring(bench.submit(f"r{n}"), S.PREFILLING) for n in range(2))
    bench.p_fails(one, EXHAUSTED)
    assert one.state is S.QUEUED
    bench.handed_off(two)
    assert one.state is S.RESERVING


def test_a_worker_that_had_no_room_is_passed_over_for_one_that_may_have():
    bench = Bench("p1", "d1", "d2")
    request = bench.submit()
    assert request.decode_id == "d1"
    bench.d_fails(request, EXHAUSTED)
    assert (request.decode_id, request.attempt, bench.cancels()) == ("d2", 1, [])


def test_a_worker_that_had_no_room_and_says_no_more_is_asked_again_in_time():
    bench = Bench()
    request = bench.submit()
    bench.d_fails(request, EXHAUSTED)
    assert request.state is S.QUEUED
    bench.expire(500)
    assert request.state is S.RESERVING


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_no_room_again_and_again_ends_with_the_wait(role):
    bench = Bench(queue_wait_ms=100)
    request = bench.submit()
    for now in (50, 100, 101):
        assert bench.end(request) is None
        bench.now = now
        if role == "prefill":
            bench.reserved(request)
            bench.p_fails(request, EXHAUSTED, queued=9)
        else:
            bench.d_fails(request, EXHAUSTED, free=0)
        (bench.d if role == "decode" else bench.p)()
    assert isinstance(bench.end(request), ExhaustedTrouble)
    assert len(bench.dispatcher) == 0


def test_a_retry_goes_to_another_pair_when_there_is_one():
    bench = Bench("p1", "p2", "d1")
    request = bench.bring(bench.submit(), S.PREFILLING)
    assert (request.prefill_id, request.decode_id) == ("p1", "d1")
    bench.d_fails(request)
    assert (request.prefill_id, request.decode_id) == ("p2", "d1")
    bench.down("p2")
    assert (request.prefill_id, request.decode_id) == ("p1", "d1")  # there is no other


@pytest.mark.parametrize("broken", ["p1", "d1"])
def test_a_worker_that_always_fails_costs_no_request_while_there_is_a_healthy_one(broken):
    bench = Bench("p1", "p2", "d1", "d2")
    failed = 0
    for n in range(40):
        bench.now += 100
        request = bench.submit(f"r{n}")
        while bench.end(request) is None:
            bench.bring(request, S.PREFILLING)
            if broken in (request.prefill_id, request.decode_id):
                failed += 1
                (bench.p_fails if broken == "p1" else bench.d_fails)(request)
            else:
                bench.handed_off(request)
                bench.step(request, 0, EOS, ending=1)
        assert bench.end(request) is Ending.EOS
        assert request.attempt <= 2
    assert failed <= 5, "it is asked again after 0.5, 1, 2 s"


def test_of_many_workers_that_fail_at_once_the_only_healthy_one_is_found():
    bench = Bench("p1", *(f"d{n}" for n in range(30, 42)), attempts_max=12)
    request = bench.submit()
    for _ in range(11):
        assert request.decode_id != "d41"
        bench.d_fails(request)
    assert (request.decode_id, request.state) == ("d41", S.RESERVING)


def test_the_last_attempt_waits_for_a_worker_that_has_not_failed():
    bench = Bench("p1", "d1", "d2", attempts_max=2)
    bench.d("d2", free=0)
    request = bench.submit()
    bench.d_fails(request)
    assert (request.state, request.attempt) == (S.QUEUED, 1)
    bench.expire(400)
    assert request.state is S.QUEUED
    bench.d("d2")
    assert (request.state, request.decode_id) == (S.RESERVING, "d2")


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_what_no_worker_can_serve_fails_at_once(role):
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    key = request.key
    (bench.d_fails if role == "decode" else bench.p_fails)(request, pb.FAILURE_CODE_INVALID)
    assert isinstance(bench.end(request), InvalidTrouble)
    assert set(bench.cancels()) == {("d1", key), ("p1", key)}
    assert len(bench.dispatcher) == 0


@pytest.mark.parametrize("how", ["down", "failed"])
def test_an_answer_that_is_complete_needs_no_worker(how):
    bench = Bench()
    request = bench.bring(bench.submit(), S.DECODING)
    bench.step(request, 2, EOS)  # its ending is lost with the worker
    if how == "down":
        bench.down("d1")
    else:
        bench.d_fails(request)
    assert bench.end(request) is Ending.EOS
    assert bench.seen(request) == [10, 11, EOS]


def test_an_answer_of_full_length_needs_no_worker():
    bench = Bench()
    request = bench.bring(bench.submit(max_tokens=2), S.DECODING)
    bench.down("d1")
    assert bench.end(request) is Ending.LENGTH


def test_a_first_token_that_ends_the_answer_survives_the_prefill_worker():
    bench = Bench()
    request = bench.bring(bench.submit(), S.PREFILLING)
    bench.first_token(request, EOS)
    bench.down("p1")
    assert bench.end(request) is Ending.EOS


def test_requests_that_lost_their_worker_keep_their_order():
    bench = Bench("p1", "d1", prefill_backlog_tokens=1000)
    requests = [bench.bring(bench.submit(f"r{n}"), S.DECODING) for n in range(3)]
    bench.down("d1")
    bench.up("d2")
    again = [reserve.request_id for _, reserve in bench.reserves()[-3:]]
    assert again == [r.request_id for r in requests]


# ---- waits have an end


def test_a_request_that_waited_too_long_is_told_that_there_was_no_room():
    bench = Bench("p1", queue_wait_ms=100)
    request = bench.submit()
    bench.expire(100)
    assert bench.end(request) is None
    bench.expire(101)
    assert isinstance(bench.end(request), ExhaustedTrouble)
    assert len(bench.dispatcher) == 0


def test_a_running_request_does_not_expire():
    bench = Bench(queue_wait_ms=100)
    request = bench.bring(bench.submit(), S.DECODING)
    bench.expire(1e6)
    assert request.state is S.DECODING


def test_a_request_placed_again_late_gets_the_whole_wait_again():
    bench = Bench(queue_wait_ms=100)
    request = bench.bring(bench.submit(), S.DECODING)
    bench.now = 500  # has been streaming for longer than a queue wait
    bench.down("d1")
    bench.expire(501)
    assert bench.end(request) is None
    bench.up("d2")
    assert request.state is S.RESERVING


def test_a_decode_worker_that_does_not_answer_reserve_is_given_up():
    bench = Bench("p1", "d1", reserve_ms=50)
    request = bench.submit()
    key = request.key
    bench.expire(50)
    assert request.attempt == 1
    bench.expire(51)
    assert bench.cancels() == [("d1", key)]
    assert (request.state, request.attempt) == (S.RESERVING, 2)


# ---- the client lets go


@pytest.mark.parametrize(
    ("state", "told"),
    [(S.RESERVING, ["d1"]), (S.PREFILLING, ["d1", "p1"]), (S.DECODING, ["d1", "p1"])],
    ids=names,
)
def test_letting_go_cancels_at_every_worker_that_has_it(state, told):
    bench = Bench()
    request = bench.bring(bench.submit(), state)
    key = request.key
    bench.let_go(request)
    assert bench.cancels() == [(worker, key) for worker in told]
    assert request.state is S.ENDED
    assert len(bench.dispatcher) == 0
    bench.let_go(request)
    assert len(bench.cancels()) == len(told)


def test_letting_go_in_the_queue_tells_nobody_and_lets_the_next_one_pass():
    bench = Bench(blocks=10, queue_patience_ms=1000)
    bench.d(free=2)
    first = bench.submit("large", prompt=30)
    second = bench.submit("small")
    assert (first.state, second.state) == (S.QUEUED, S.QUEUED)
    bench.let_go(first)
    assert bench.cancels() == []
    bench.d(free=3)
    assert second.state is S.RESERVING


def test_nothing_is_delivered_after_letting_go():
    bench = Bench()
    request = bench.bring(bench.submit(), S.DECODING)
    bench.let_go(request)
    bench.step(request, 2, 12, ending=2)
    bench.handed_off(request)
    assert bench.seen(request) == [10, 11]
    assert bench.end(request) is None


# ---- urgency


def measured(bench: Bench, queued: int = 0) -> None:
    """Both workers say what their steps cost: a token of a prompt 1 ms."""
    cost = pb.StepCost(base_ms=1, ms_per_prompt_token=1, ms_per_sequence=1)
    load = pb.PrefillLoad(queued_tokens=queued, cost=cost)
    bench.take(bench.dispatcher.on_prefill_event("p1", pb.PrefillEvent(load=load), bench.now))
    load_d = pb.DecodeLoad(blocks_free=bench.blocks, cost=cost)
    bench.take(bench.dispatcher.on_decode_event("d1", pb.DecodeEvent(load=load_d), bench.now))


def test_the_urgent_go_first():
    bench = Bench("p1")
    requests = {n: bench.submit(f"r{n}", priority=n) for n in (0, 5, -5)}
    due = bench.submit("due", ttft_deadline_ms=1000)
    bench.up("d1")
    order = [reserve.request_id for _, reserve in bench.reserves()]
    assert order == [requests[-5].request_id, due.request_id, "r0", "r5"]


def test_a_deadline_that_would_be_missed_is_refused_at_once_with_a_hint():
    bench = Bench(prefill_backlog_tokens=1000)
    measured(bench, queued=500)
    with pytest.raises(DeadlineError, match=r"after 51\d ms, due after 300 ms") as refused:
        bench.submit(ttft_deadline_ms=300)
    assert 200 < refused.value.retry_ms < 220
    assert len(bench.dispatcher) == 0
    assert bench.submit(ttft_deadline_ms=600).state is S.RESERVING


def test_the_queue_ahead_counts_against_a_deadline_unless_it_is_passed():
    bench = Bench(prefill_backlog_tokens=20)
    measured(bench, queued=20)
    for n in range(3):
        bench.submit(f"r{n}", prompt=20)
    with pytest.raises(DeadlineError):
        bench.submit("due", prompt=20, ttft_deadline_ms=60, priority=1)
    urgent = bench.submit("urgent", prompt=20, ttft_deadline_ms=60)
    assert urgent.state is S.QUEUED


def test_nobody_is_refused_on_a_guess():
    bench = Bench()
    assert bench.submit(prompt=100, ttft_deadline_ms=1).state is S.RESERVING
    cost = pb.StepCost(base_ms=1, ms_per_sequence=1)
    load = pb.DecodeLoad(blocks_free=bench.blocks, cost=cost)
    bench.take(bench.dispatcher.on_decode_event("d1", pb.DecodeEvent(load=load), 0))
    bench.submit("r2", ttft_deadline_ms=1)  # its prefill worker has measured nothing
    assert Bench("p1").submit(prompt=100, ttft_deadline_ms=1).state is S.QUEUED


def test_a_queue_that_was_seen_to_be_slow_counts_where_no_worker_has_room():
    bench = Bench(blocks=3)
    running = bench.submit("r0")
    for n in range(1, 4):
        bench.submit(f"r{n}")
    bench.now = 500
    bench.let_go(running)
    bench.d(free=0)
    with pytest.raises(DeadlineError):
        bench.submit("due", ttft_deadline_ms=900, priority=1)
    assert bench.submit("later", ttft_deadline_ms=1100, priority=1).state is S.QUEUED


def test_a_deadline_that_can_no_longer_be_met_ends_the_wait():
    bench = Bench(prefill_backlog_tokens=20)
    measured(bench, queued=15)
    request = bench.submit(prompt=8, ttft_deadline_ms=50)
    bench.expire(41)  # its prompt takes 9 ms
    assert bench.end(request) is None
    bench.expire(42)
    assert isinstance(bench.end(request), ExhaustedTrouble)
    assert "in time for 50 ms" in str(bench.end(request))
    assert len(bench.dispatcher) == 0


def test_a_deadline_is_met_by_the_first_token_whatever_happens_afterwards():
    bench = Bench()
    request = bench.bring(bench.submit(ttft_deadline_ms=50), S.DECODING)
    bench.now = 1000
    bench.down("d1")
    bench.expire(1001)
    assert (request.state, bench.end(request)) == (S.QUEUED, None)


def test_a_full_queue_says_how_long_it_will_take():
    bench = Bench("p1", queue_max=2, blocks=3)
    for n in range(2):
        bench.submit(f"r{n}")
    with pytest.raises(QueueFullError) as refused:
        bench.submit("r2")
    assert refused.value.retry_ms is None, "nobody knows yet"
    bench.now = 10
    bench.up("d1")
    bench.down("d1")
    with pytest.raises(QueueFullError) as refused:
        bench.submit("r3")
    assert refused.value.retry_ms > 0


def test_a_worker_that_looked_slow_meets_deadlines_again_after_a_while():
    bench = Bench("p1", "p2", "d1")
    measured(bench)
    cost = pb.StepCost(base_ms=1, ms_per_prompt_token=500)
    event = pb.PrefillEvent(load=pb.PrefillLoad(cost=cost))
    bench.take(bench.dispatcher.on_prefill_event("p2", event, 0))
    for second in range(60):
        bench.expire(second * 1000)
    bench.down("p1")
    assert bench.submit(ttft_deadline_ms=100).state is S.RESERVING


# ---- cached blocks


def tell(bench: Bench, worker: str, number: int, blocks: int, everything: bool = False) -> None:
    added = b"".join(names_of(range(4 * blocks)).hashes)
    changes = pb.BlockChanges(number=number, everything=everything, added=added)
    if worker[0] == "p":
        event = pb.PrefillEvent(blocks=changes)
        bench.take(bench.dispatcher.on_prefill_event(worker, event, bench.now))
    else:
        event = pb.DecodeEvent(blocks=changes, load=pb.DecodeLoad(blocks_free=bench.blocks))
        bench.take(bench.dispatcher.on_decode_event(worker, event, bench.now))


def test_a_prompt_goes_to_workers_that_cache_its_beginning():
    bench = Bench("p1", "p2", "d1", "d2", prefill_backlog_tokens=1000)
    for worker in ("p2", "d2"):
        tell(bench, worker, 1, blocks=10, everything=True)
    request = bench.submit(prompt=80)
    assert (request.prefill_id, request.decode_id) == ("p2", "d2")


@pytest.mark.parametrize("worker", ["p1", "d1"])
def test_changes_with_a_gap_make_the_worker_say_everything_again(worker):
    bench = Bench()
    tell(bench, worker, 1, blocks=1, everything=True)
    tell(bench, worker, 3, blocks=2)
    tell(bench, worker, 4, blocks=2)
    asked = [(c.worker_id, c.command.WhichOneof("command")) for c in bench.sent]
    assert asked == [(worker, "resync")]


def test_only_tokens_that_are_not_cached_are_backlog():
    bench = Bench(prefill_backlog_tokens=50)
    tell(bench, "p1", 1, blocks=9, everything=True)
    first, second = bench.submit("r1", prompt=40), bench.submit("r2", prompt=40)
    assert (first.state, second.state) == (S.RESERVING, S.RESERVING)


# ---- several routers on the same workers


class Shared:
    """A decode worker that two routers believe in; what it has is decided by its reservations."""

    def __init__(self, worker: str, blocks: int) -> None:
        self.worker, self.free = worker, blocks
        self.held: dict[tuple[int, int], int] = {}

    def answer(self, router: int, bench: Bench, reserve: pb.Reserve) -> bool:
        needed = -(-(reserve.prompt_tokens + reserve.sampling.max_tokens - 1) // 4)
        if needed > self.free:
            failed = pb.Failed(key=reserve.key, code=EXHAUSTED)
            bench.d(self.worker, free=self.free, failed=failed)
            return False
        self.free -= needed
        self.held[router, reserve.key] = needed
        bench.d(self.worker, free=self.free, reserved=pb.Reserved(key=reserve.key))
        return True

    def finish(self, router: int, bench: Bench, request: Request) -> None:
        self.free += self.held.pop((router, request.key))
        output = pb.SequenceOutput(key=request.key, token_ids=[EOS], ending=pb.ENDING_EOS, offset=0)
        bench.d(self.worker, free=self.free, step=pb.StepOutput(outputs=[output]))


def test_two_routers_that_want_the_same_room_are_both_served_in_the_end():
    benches = [Bench("d1", "d2", blocks=6, queue_max=50, attempts_max=1) for _ in range(2)]
    workers = {name: Shared(name, 6) for name in ("d1", "d2")}
    requests = [
        [bench.submit(f"r{n}", prompt=8, max_tokens=5) for n in range(6)] for bench in benches
    ]
    refused = 0
    for _ in range(200):
        for router, bench in enumerate(benches):
            sent, bench.sent = bench.sent, []
            for command in sent:
                reserve = command.command.reserve
                refused += not workers[command.worker_id].answer(router, bench, reserve)
        for router, bench in enumerate(benches):
            running = [r for r in requests[router] if r.state is S.PREFILLING]
            if running:
                workers[running[0].decode_id].finish(router, bench, running[0])
            for name, worker in workers.items():  # what each step says to every router
                bench.d(name, free=worker.free)
        if not any(len(bench.dispatcher) for bench in benches):
            break
    assert refused, "they never wanted the same room"
    assert refused < 100, "they kept getting in each other's way"
    for bench, mine in zip(benches, requests, strict=True):
        assert [bench.end(r) for r in mine] == [Ending.EOS] * 6, "no attempt was counted"


class Claiming(Shared):
    """One that, having refused a large request, leaves room to no smaller one for a while."""

    claim: int = 0  # blocks of the largest that was refused
    claimed_until: float = 0.0

    def answer(self, router: int, bench: Bench, reserve: pb.Reserve) -> bool:
        needed = -(-(reserve.prompt_tokens + reserve.sampling.max_tokens - 1) // 4)
        claimed = bench.now < self.claimed_until and needed < self.claim
        if claimed:
            failed = pb.Failed(key=reserve.key, code=EXHAUSTED)
            bench.d(self.worker, free=self.free, failed=failed)
            return False
        if needed > self.free:
            self.claim, self.claimed_until = needed, bench.now + 5000
        elif needed >= self.claim:
            self.claim = 0
        return super().answer(router, bench, reserve)


def test_a_large_request_and_small_ones_of_two_routers_are_all_served_on_one_worker():
    small = {"prompt": 8, "max_tokens": 5}  # 3 blocks
    benches = [
        Bench("d1", queue_max=200, prefill_backlog_tokens=10_000, attempts_max=1) for _ in range(2)
    ]
    worker = Claiming("d1", 100)
    large, waits, count = None, [[], []], 0
    ends: dict[Request, float] = {}  # when it is done
    for now in range(0, 60_000, 100):
        for bench in benches:
            bench.expire(now)
            for _ in range(3):  # 45 of the 100 blocks, for each router
                count += 1
                bench.submit(f"r{count}", **small)
        if now == 5000:
            large = benches[0].submit("large", prompt=330, max_tokens=11)  # 85 blocks
        for router, bench in enumerate(benches):
            while bench.sent:
                sent, bench.sent = bench.sent, []
                for command in sent:
                    if command.command.WhichOneof("command") == "reserve":
                        worker.answer(router, bench, command.command.reserve)
            for request in bench.clients:
                if request.state is S.PREFILLING and request not in ends:
                    ends[request] = now + 500
                    waits[router].append(now - request.times.arrived_at_ms)
                elif request.state is S.PREFILLING and ends[request] <= now:
                    worker.finish(router, bench, request)
        for bench in benches:
            bench.d("d1", free=worker.free)
        if large is not None and large.state is S.ENDED:
            break
    assert large is not None
    assert benches[0].end(large) is Ending.EOS
    assert ends[large] - large.times.arrived_at_ms < 12_000, "patience, and one time of keeping"
    means = [sum(wait) / len(wait) for wait in waits]
    assert min(len(wait) for wait in waits) > 50
    assert max(means) < 2 * min(means) + 500, means


def test_figures_of_a_worker_cover_what_other_routers_have_asked_of_it():
    bench = Bench("p1", "d1", "d2")
    load = pb.DecodeLoad(blocks_free=50, running=5)
    bench.take(bench.dispatcher.on_decode_event("d1", pb.DecodeEvent(load=load), 0))
    assert [bench.submit(f"r{n}").decode_id for n in range(4)] == ["d2"] * 4


def test_a_worker_that_refuses_is_not_asked_again_at_each_of_its_steps():
    bench = Bench("d1", queue_max=50)
    bench.d(free=40)
    for n in range(20):
        bench.submit(f"r{n}")
    asked = {key for _, r in bench.reserves() for key in [r.key]}
    while True:
        waiting = [r for r in bench.clients if r.key in asked and r.state is S.RESERVING]
        if not waiting:
            break
        bench.d_fails(waiting[0], EXHAUSTED, free=40)  # kept for another router
    bench.sent.clear()
    for _ in range(30):
        bench.d(free=40)
    assert bench.sent == []
    bench.d(free=41)
    assert bench.reserves() != []


# ---- all of it at random


def right_answer(request: Request) -> list[int]:
    """What any worker computes: each token follows from those before it."""
    tokens = list(request.prompt)
    while len(tokens) - len(request.prompt) < request.sampling.max_tokens:
        token = (sum(tokens) * 31 + len(tokens)) % 7
        tokens.append(EOS if token == 6 else token)
        if tokens[-1] == EOS:
            break
    return tokens[len(request.prompt) :]


@dataclass
class Attempt:
    """An attempt as its two workers have it."""

    request: Request
    key: int
    decode: str
    base: int
    here: bool  # the decode worker computes the prompt
    prefill: str = ""
    first_token_sent: bool = False
    handed_off: bool = False
    sent: int = 0


class World(Bench):
    """Workers that do their work, fail and die when the dice say so."""

    def __init__(self, dice: random.Random, attempts_max: int = 1000) -> None:
        super().__init__(
            *("p1", "p2", "d1", "d2"),
            blocks=8,
            attempts_max=attempts_max,
            strikes_max=1000,
            queue_max=50,
            local_prefill=dice.choice(("auto", "never")),
        )
        self.dice = dice
        self.alive = {"p1", "p2", "d1", "d2"}
        self.attempts: dict[int, Attempt] = {}
        self.free = dict.fromkeys(("d1", "d2"), self.blocks)
        self.held: dict[int, tuple[str, int]] = {}
        self.left: set[Request] = set()  # whose clients went away
        self.count = 0

    def read_commands(self) -> None:
        while self.sent:
            sent, self.sent = self.sent, []
            self.read(sent)
            for worker in sorted(self.alive):  # a cancel may have made room
                if worker[0] == "d":
                    self.d(worker, free=self.free[worker])
                else:
                    self.p(worker)

    def read(self, sent: list[ToPrefill | ToDecode]) -> None:
        for command in sent:
            assert command.worker_id in self.alive, "a command to a worker that is gone"
            kind = command.command.WhichOneof("command")
            body = getattr(command.command, kind)
            if kind in ("resync", "acknowledge"):
                continue
            if kind == "reserve":
                request = next(r for r in self.clients if r.request_id == body.request_id)
                base = body.prompt_tokens - len(request.prompt)
                self.attempts[body.key] = Attempt(
                    request, body.key, command.worker_id, base, here=body.prefill_here
                )
                self.check_prompt(request, body)
            elif kind == "prefill":
                self.attempts[body.key].prefill = command.worker_id
                self.check_prompt(self.attempts[body.key].request, body)
            elif command.worker_id[0] == "d":
                self.release(body.key)

    def check_prompt(self, request: Request, asked: pb.Prefill | pb.Reserve) -> None:
        assert list(asked.prompt_token_ids) == [*request.prompt, *self.seen(request)]

    def release(self, key: int) -> None:
        worker, blocks = self.held.pop(key, ("", 0))
        if worker in self.alive:
            self.free[worker] += blocks
        self.attempts.pop(key, None)

    def tell_blocks(self) -> None:
        """What a cache says may be far from what the workers really reuse."""
        if self.alive:
            worker = self.dice.choice(sorted(self.alive))
            blocks = [self.dice.randbytes(16), *names_of(range(12)).hashes]
            changes = pb.BlockChanges(
                number=self.dice.randrange(3),
                everything=self.dice.random() < 0.5,
                added=b"".join(blocks[: self.dice.randrange(5)]),
                removed=b"".join(blocks[: self.dice.randrange(5)]),
            )
            if worker[0] == "p":
                self.p(worker, blocks=changes)
            else:
                self.d(worker, free=self.free[worker], blocks=changes)

    def act(self, kills: bool = True) -> None:
        actions = [self.work] * 12 + [self.tell_blocks, self.reap]
        if kills:
            actions += [self.new, self.new, self.kill, self.revive, self.fail, self.quit]
        self.dice.choice(actions)()
        self.read_commands()

    def reap(self) -> None:
        self.expire(self.now + 1)

    def new(self) -> None:
        if len(self.dispatcher) < 8:
            self.count += 1
            self.submit(
                f"r{self.count}",
                prompt=self.dice.randint(1, 12),
                max_tokens=self.dice.randint(1, 9),
                priority=self.dice.choice((-100, 0, 0, 0, 100)),
            )

    def kill(self) -> None:
        if self.alive:
            worker = self.dice.choice(sorted(self.alive))
            self.alive.remove(worker)
            for key, attempt in list(self.attempts.items()):
                if attempt.decode == worker:
                    self.release(key)
                elif attempt.prefill == worker:
                    attempt.prefill = "dead"
            self.down(worker)

    def revive(self) -> None:
        for worker in sorted({"p1", "p2", "d1", "d2"} - self.alive)[:1]:
            self.alive.add(worker)
            self.free[worker] = self.blocks
            self.up(worker)

    def quit(self) -> None:
        if self.dice.random() < 0.3 and self.clients:
            request = self.dice.choice(list(self.clients))
            if self.end(request) is None:
                self.left.add(request)
            self.let_go(request)

    def fail(self) -> None:
        if self.attempts:
            attempt = self.dice.choice(list(self.attempts.values()))
            code = self.dice.choice((PEER_LOST, EXHAUSTED))
            failed = pb.Failed(key=attempt.key, code=code)
            if attempt.prefill in self.alive and self.dice.random() < 0.5:
                attempt.prefill = "dead"
                self.p(self.dice.choice(sorted(self.alive & {"p1", "p2"})), failed=failed)
            else:
                self.release(attempt.key)
                self.d(attempt.decode, free=self.free[attempt.decode], failed=failed)

    def work(self) -> None:
        """One worker does the next thing for one attempt."""
        if self.attempts:
            attempt = self.dice.choice(list(self.attempts.values()))
            if attempt.key not in self.held:
                self.answer_reserve(attempt)
            elif attempt.prefill == "dead" and not attempt.sent:
                self.release(attempt.key)  # the writer is lost before it has committed
                failed = pb.Failed(key=attempt.key, code=PEER_LOST)
                self.d(attempt.decode, free=self.free[attempt.decode], failed=failed)
            elif (attempt.here or attempt.prefill in self.alive) and not attempt.first_token_sent:
                attempt.first_token_sent = True
                token = right_answer(attempt.request)[attempt.base]
                first_token = pb.FirstToken(key=attempt.key, token_id=token)
                if attempt.here:
                    free = self.free[attempt.decode]
                    self.d(attempt.decode, free=free, first_token=first_token)
                else:
                    self.p(attempt.prefill, first_token=first_token)
            elif attempt.prefill in self.alive and not attempt.handed_off:
                if self.dice.random() < 0.5:
                    attempt.handed_off = True
                    self.p(attempt.prefill, handed_off=pb.HandedOff(key=attempt.key))
                else:
                    self.decode_one(attempt)  # its word may come before the prefill worker's
            elif attempt.first_token_sent:
                self.decode_one(attempt)

    def answer_reserve(self, attempt: Attempt) -> None:
        request, worker = attempt.request, attempt.decode
        needed = -(-(len(request.prompt) + request.sampling.max_tokens - 1) // 4)
        if needed > self.free[worker] or self.dice.random() < 0.1:
            del self.attempts[attempt.key]
            failed = pb.Failed(key=attempt.key, code=EXHAUSTED)
            self.d(worker, free=self.free[worker], failed=failed)
            return
        self.free[worker] -= needed
        self.held[attempt.key] = (worker, needed)
        reserved = pb.Reserved(key=attempt.key, ticket=transfer_pb2.Ticket())
        self.d(worker, free=self.free[worker], reserved=reserved)

    def decode_one(self, attempt: Attempt) -> None:
        answer = right_answer(attempt.request)[attempt.base :]
        if attempt.sent >= len(answer):
            return
        token, offset = answer[attempt.sent], attempt.sent
        attempt.sent += 1
        done = attempt.sent == len(answer)
        output = pb.SequenceOutput(
            key=attempt.key,
            offset=offset,
            token_ids=[token],
            ending=(pb.ENDING_EOS if token == EOS else pb.ENDING_LENGTH)
            if done
            else pb.ENDING_NONE,
        )
        if done:
            worker, blocks = self.held[attempt.key]
            self.free[worker] += blocks
            self.held[attempt.key] = (worker, 0)
        step = pb.StepOutput(outputs=[output])
        self.d(attempt.decode, free=self.free[attempt.decode], step=step)

    def check(self) -> None:
        for request, client in self.clients.items():
            answer = right_answer(request)
            assert client.tokens == answer[: len(client.tokens)]
            if isinstance(client.end, Ending):
                assert client.tokens == answer
                assert client.end is (Ending.EOS if answer[-1] == EOS else Ending.LENGTH)
            else:
                assert client.end is None


@given(dice=st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_whatever_happens_clients_see_a_prefix_of_the_right_answer_and_in_the_end_all_of_it(dice):
    world = World(random.Random(dice.getrandbits(64)))
    for _ in range(250):
        world.act()
        world.check()
    for _ in range(4):
        world.revive()
        world.read_commands()
    for _ in range(4000):
        if not len(world.dispatcher):
            break
        world.act(kills=False)
    world.check()
    assert len(world.dispatcher) == 0
    for request, client in world.clients.items():
        assert request.state is S.ENDED
        assert (client.end is None) == (request in world.left)


class OneBroken(World):
    """One worker fails every request sooner or later; the others do their work."""

    def __init__(self, dice: random.Random, broken: str) -> None:
        super().__init__(dice, attempts_max=3)
        self.broken = broken

    def work(self) -> None:
        tried = [a for a in self.attempts.values() if self.broken in (a.prefill, a.decode)]
        if not tried or self.dice.random() < 0.5:
            super().work()
            return
        attempt = self.dice.choice(tried)
        code = self.dice.choice((PEER_LOST, pb.FAILURE_CODE_INTERNAL, pb.FAILURE_CODE_EXPIRED))
        failed = pb.Failed(key=attempt.key, code=code)
        if attempt.prefill == self.broken:
            attempt.prefill = "dead"
            self.p(self.broken, failed=failed)
        else:
            self.release(attempt.key)
            self.d(self.broken, free=self.free[self.broken], failed=failed)


@pytest.mark.parametrize("broken", ["p1", "d1"])
@given(dice=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_nobody_fails_for_one_broken_worker_while_healthy_ones_stand_beside_it(broken, dice):
    world = OneBroken(random.Random(dice.getrandbits(64)), broken)
    for _ in range(60):
        world.new()
        for _ in range(world.dice.randrange(12)):
            world.act(kills=False)
    for _ in range(4000):
        if not len(world.dispatcher):
            break
        world.act(kills=False)
    assert len(world.dispatcher) == 0
    world.check()  # no end is a trouble
