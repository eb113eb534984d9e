"""Cancel, timeout, lost worker and drain in every state; strikes. `Bench` plays the workers.

`Bench` asserts after every event that all sums are those of the requests.
"""

from typing import Any

import pytest
from dispatcher_bench import EXHAUSTED, PEER_LOST, Bench, S

from kvrelay.wire import worker_pb2 as pb
from router.commands import ExhaustedTrouble, PoisonTrouble, TakenOverTrouble, UnavailableTrouble
from router.request import TRANSITIONS, Ending, Request, RequestEvent, RequestState
from router.strikes import strikes_of

EXPIRED = pb.FAILURE_CODE_EXPIRED
TAKEN_OVER = pb.FAILURE_CODE_TAKEN_OVER
ENDS_BY_LENGTH = 2
TOKENS = 4
LIVE = [state for state in S if state is not S.ENDED]
PLACED = [S.RESERVING, S.PREFILLING, S.DECODING]


def names(value: object) -> str:
    return getattr(value, "name", str(value))


def in_state(state: RequestState, *workers: str, **config: Any) -> tuple[Bench, Request]:
    """One request, at p1 and d1 unless it is QUEUED. Its answer is 10, 11, 12, 13."""
    bench = Bench(*(workers or ("p1", "d1")), **config)
    if state is S.QUEUED:
        for worker in bench.dispatcher.workers.decode:
            bench.d(worker, free=0)
        return bench, bench.submit(max_tokens=TOKENS)
    return bench, bench.bring(bench.submit(max_tokens=TOKENS), state)


def give_room(bench: Bench) -> None:
    for worker in list(bench.dispatcher.workers.decode):
        bench.d(worker)


def work(bench: Bench, request: Request) -> None:
    """Its workers do the next thing for it."""
    answer = [10, 11, 12, 13]
    if request.state is S.RESERVING:
        bench.reserved(request)
    elif request.state is S.PREFILLING and not request.begun:
        bench.first_token(request, answer[request.base])
    elif not request.prefill_settled:
        bench.handed_off(request)
    else:
        sent = len(request.answer) - request.base
        if request.state is S.PREFILLING:
            sent -= 1  # a decode worker repeats the first token
        at = request.base + sent
        ending = ENDS_BY_LENGTH if at >= TOKENS - 1 else 0
        bench.step(request, sent, *answer[at : at + 1], ending=ending)


def finish(bench: Bench, *requests: Request) -> None:
    """All goes well from here: clients have seen each token once, and nothing is left over."""
    give_room(bench)
    for _ in range(20 * len(requests)):
        for request in requests:
            if bench.end(request) is None and request.state is not S.QUEUED:
                work(bench, request)
    for request in requests:
        assert bench.seen(request) == [10, 11, 12, 13]
        assert bench.end(request) is Ending.LENGTH
    assert len(bench.dispatcher) == 0


def test_every_state_has_a_row_for_each_thing_that_may_go_wrong():
    events = (RequestEvent.CANCEL, RequestEvent.TIMEOUT, RequestEvent.PEER_LOST, RequestEvent.DRAIN)
    assert [(s, e) for s in LIVE for e in events if (s, e) not in TRANSITIONS] == []


# ---- cancel


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (S.QUEUED, []),
        (S.RESERVING, ["d1"]),
        (S.PREFILLING, ["d1", "p1"]),
        (S.DECODING, ["d1", "p1"]),
    ],
    ids=names,
)
def test_cancel_tells_whoever_has_it_and_nobody_else(state, told):
    bench, request = in_state(state)
    key, seen = request.key, list(bench.seen(request))
    bench.sent.clear()
    bench.let_go(request)
    assert request.state is S.ENDED
    assert bench.cancels() == [(worker, key) for worker in told]
    assert (len(bench.sent), len(bench.dispatcher)) == (len(told), 0)
    assert (bench.seen(request), bench.end(request)) == (seen, None)
    give_room(bench)
    assert bench.reserves() == []


# ---- timeout


def test_timeout_in_the_queue_ends_it_with_a_typed_refusal():
    bench, request = in_state(S.QUEUED, queue_wait_ms=100)
    bench.expire(101)
    assert (request.state, bench.sent) == (S.ENDED, [])
    assert isinstance(bench.end(request), ExhaustedTrouble)
    assert len(bench.dispatcher) == 0


def test_timeout_of_reserve_places_it_again():
    bench, request = in_state(S.RESERVING, "p1", "d1", "d2", reserve_ms=50)
    key = request.key
    bench.expire(51)
    assert (request.state, request.decode_id) == (S.RESERVING, "d2")
    assert bench.cancels() == [("d1", key)]
    finish(bench, request)


@pytest.mark.parametrize(
    ("state", "role"),
    [(S.PREFILLING, "prefill"), (S.PREFILLING, "decode"), (S.DECODING, "decode")],
    ids=names,
)
def test_timeout_at_a_worker_places_it_again(state, role):
    """The worker's lease has run out: it says so."""
    bench, request = in_state(state)
    key, seen = request.key, list(bench.seen(request))
    (bench.d_fails if role == "decode" else bench.p_fails)(request, EXPIRED)
    assert (request.state, request.key, bench.seen(request)) == (S.RESERVING, key + 1, seen)
    assert set(bench.cancels()) == {("d1", key), ("p1", key)}
    assert bench.reserves()[-1][1].prompt_tokens == 8 + len(seen)
    finish(bench, request)


# ---- a worker is lost


def test_a_lost_worker_changes_nothing_for_who_waits():
    bench, request = in_state(S.QUEUED, "p1", "d1", "d2")
    bench.sent.clear()
    bench.down("d1")
    assert (request.state, bench.sent, request.strikes) == (S.QUEUED, [], {})
    finish(bench, request)


@pytest.mark.parametrize("state", PLACED, ids=names)
@pytest.mark.parametrize("here", [False, True], ids=["by-p", "by-d"])
def test_a_lost_decode_worker_is_replaced(state, here):
    workers = ("d1", "d2") if here else ("p1", "d1", "d2")
    bench, request = in_state(state, *workers)
    key, seen = request.key, list(bench.seen(request))
    bench.down("d1")
    assert (request.state, request.decode_id) == (S.RESERVING, "d2")
    told = [] if here or state is S.RESERVING else [("p1", key)]
    assert bench.cancels() == told
    assert (bench.seen(request), bench.end(request)) == (seen, None)
    finish(bench, request)


@pytest.mark.parametrize("state", [S.RESERVING, S.PREFILLING], ids=names)
def test_a_lost_prefill_worker_is_replaced(state):
    bench, request = in_state(state, "p1", "p2", "d1")
    key = request.key
    bench.down("p1")
    assert (request.state, request.prefill_id) == (S.RESERVING, "p2")
    assert bench.cancels() == [("d1", key)]
    finish(bench, request)


def test_a_prefill_worker_lost_while_the_answer_runs_is_not_missed():
    bench, request = in_state(S.DECODING)
    bench.down("p1")
    assert (request.state, request.strikes, bench.cancels()) == (S.DECODING, {}, [])
    finish(bench, request)


def test_a_prefill_worker_lost_between_commit_and_acknowledgement_costs_no_token():
    """The decode worker may run already, and we do not know it yet."""
    bench, request = in_state(S.PREFILLING, "p1", "p2", "d1")
    bench.first_token(request, 10)
    key = request.key
    bench.down("p1")
    assert bench.cancels() == [("d1", key)]
    outputs = [pb.SequenceOutput(key=key, offset=0, token_ids=[10, 11])]
    bench.d(step=pb.StepOutput(outputs=outputs))  # on its way when the cancel was
    assert (bench.seen(request), request.state) == ([10], S.RESERVING)
    finish(bench, request)


@pytest.mark.parametrize("state", PLACED, ids=names)
def test_a_decode_worker_that_lost_its_peer_is_left(state):
    bench, request = in_state(state)
    key = request.key
    bench.d_fails(request, PEER_LOST)
    assert (request.state, request.key) == (S.RESERVING, key + 1)
    finish(bench, request)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_requests_wait_while_a_role_has_no_worker(role):
    """All of them are being restarted."""
    bench = Bench("p1", "d1", queue_wait_ms=1000, local_prefill="auto")
    request = bench.bring(bench.submit(max_tokens=TOKENS, prompt=40), S.PREFILLING)
    bench.down("d1" if role == "decode" else "p1")
    bench.expire(900)
    assert bench.end(request) is None
    bench.up("d2" if role == "decode" else "p2")
    finish(bench, request)


def test_a_request_outlives_any_number_of_workers():
    bench, request = in_state(S.PREFILLING, attempts_max=1, strikes_max=100)
    for n in range(20):
        worker = request.decode_id if n % 2 else request.prefill_id
        bench.up(f"{worker[0]}{n + 10}")
        bench.down(worker)
        bench.bring(request, S.PREFILLING)
    bench.p_fails(request)
    assert "failed 1 times" in str(bench.end(request)), "what workers report is still counted"


def test_deaths_without_a_token_are_part_of_the_same_wait():
    """So even a request that ends every session at once has an end."""
    bench, request = in_state(S.RESERVING, queue_wait_ms=100)
    for n in range(4):
        bench.down("d1")
        bench.now += 30
        if n < 3:
            bench.up("d1")
            assert request.state is S.RESERVING
            bench.now += 1000  # with a worker: that is no waiting
    bench.expire(bench.now)
    assert isinstance(bench.end(request), ExhaustedTrouble)


def test_a_death_after_a_token_gets_the_whole_wait_again():
    bench, request = in_state(S.QUEUED, queue_wait_ms=100)
    bench.now = 90
    give_room(bench)
    bench.bring(request, S.DECODING)
    bench.down("d1")
    bench.expire(180)
    assert bench.end(request) is None
    bench.up("d2")
    finish(bench, request)


@pytest.mark.parametrize("dies", ["p1", "d1"])
def test_a_failure_that_turns_out_to_be_a_death_is_not_counted(dies):
    """Its peer tells of it first, and the retry is on its way to the dead when that is known."""
    bench, request = in_state(S.PREFILLING, attempts_max=2)
    (bench.p_fails if dies == "d1" else bench.d_fails)(request)
    assert (request.state, request.attempt, request.attempts_failed) == (S.RESERVING, 2, 2)
    bench.up(dies[0] + "2")
    bench.down(dies)
    assert (request.state, request.attempts_failed) == (S.RESERVING, 1), "the one under way"
    assert request.strikes == {dies: 1.0}
    finish(bench, request)


def test_a_failure_that_turns_out_to_be_a_death_is_not_counted_while_it_waits_either():
    bench, request = in_state(S.PREFILLING, attempts_max=2)
    bench.d_fails(request, PEER_LOST, free=0)
    assert (request.state, request.attempts_failed) == (S.QUEUED, 1)
    bench.down("p1")
    assert (request.state, request.attempts_failed) == (S.QUEUED, 0)
    bench.up("p2")
    finish(bench, request)


def test_a_death_long_after_the_failure_has_nothing_to_do_with_it():
    bench, request = in_state(S.PREFILLING, "p1", "p2", "d1", silence_ms=100)
    bench.d_fails(request, PEER_LOST)
    assert request.prefill_id == "p2"
    bench.now = 201
    bench.down("p1")
    assert (request.attempts_failed, request.strikes) == (2, {})


def test_tokens_before_the_reservation_are_no_tokens():
    bench, request = in_state(S.RESERVING)
    bench.step(request, 0, 10)
    assert (request.state, request.attempt, bench.seen(request)) == (S.RESERVING, 2, [])
    finish(bench, request)


# ---- drain


@pytest.mark.parametrize("state", LIVE, ids=names)
@pytest.mark.parametrize("worker", ["p1", "d1"])
def test_drain_leaves_what_runs_alone_and_takes_nothing_new(state, worker):
    bench, request = in_state(state)
    before = request.state, request.key, list(bench.sent)
    bench.drain(worker)
    assert (request.state, request.key, list(bench.sent)) == before
    new = bench.submit("r2", max_tokens=TOKENS)
    bench.expire(1000)
    assert new.state is S.QUEUED
    bench.up(worker[0] + "2")
    if state is S.QUEUED and worker == "p1":
        bench.d()
    assert new.state is S.RESERVING
    assert worker not in (new.prefill_id, new.decode_id)
    if state is not S.QUEUED:
        for _ in range(10):
            if bench.end(request) is None:
                work(bench, request)
                bench.drain(worker)
        assert (bench.seen(request), bench.end(request)) == ([10, 11, 12, 13], Ending.LENGTH)


@pytest.mark.parametrize("worker", ["p1", "d1"])
def test_a_worker_that_changes_its_mind_is_placed_at_again(worker):
    bench = Bench()
    bench.drain(worker)
    request = bench.submit(max_tokens=TOKENS)
    assert request.state is S.QUEUED
    bench.drain(worker, draining=False)
    assert request.state is S.RESERVING
    finish(bench, request)


@pytest.mark.parametrize("worker", ["p1", "d1"])
def test_a_wait_for_workers_that_all_drain_has_an_end(worker):
    bench = Bench(queue_wait_ms=100, queue_patience_ms=10)
    bench.drain(worker)
    request = bench.submit(max_tokens=TOKENS)
    bench.expire(50)
    assert (request.state, bench.sent) == (S.QUEUED, [])
    bench.expire(101)
    assert isinstance(bench.end(request), ExhaustedTrouble)


def test_a_worker_kept_for_somebody_is_kept_no_longer_when_it_drains():
    bench = Bench("p1", "d1", "d2", blocks=10, queue_patience_ms=100)
    bench.d("d2", free=3)
    bench.d("d1", free=5)
    large = bench.submit("large", prompt=36)
    bench.expire(101)
    assert large.decode_id == "d1", "asked without room, so that it is known there"
    bench.d_fails(large, EXHAUSTED, free=5)
    bench.drain("d1")
    bench.d("d2")
    assert (large.state, large.decode_id) == (S.RESERVING, "d2")


@pytest.mark.parametrize("how", ["drained", "removed"])
def test_a_worker_that_ends_on_purpose_strikes_nobody(how):
    bench, request = in_state(S.DECODING, "p1", "d1", "d2")
    if how == "drained":
        bench.drain("d1")
    bench.down("d1", died=how == "drained")
    assert (request.state, request.decode_id, request.strikes) == (S.RESERVING, "d2", {})
    finish(bench, request)


# ---- another router goes on with it


@pytest.mark.parametrize("state", PLACED, ids=names)
def test_a_request_that_was_taken_over_ends_here_and_its_workers_are_left_alone(state):
    bench, request = in_state(state)
    bench.sent.clear()
    bench.d_fails(request, TAKEN_OVER)
    assert isinstance(bench.end(request), TakenOverTrouble)
    assert (request.state, bench.sent, len(bench.dispatcher)) == (S.ENDED, [], 0)


# ---- strikes


@pytest.mark.parametrize(
    ("state", "dies", "strikes"),
    [
        (S.QUEUED, "d1", 0),
        (S.QUEUED, "p1", 0),
        (S.RESERVING, "d1", 0.5),  # which had not answered
        (S.RESERVING, "p1", 0),  # which has not been given the prompt
        (S.PREFILLING, "d1", 1),
        (S.PREFILLING, "p1", 1),
        (S.DECODING, "d1", 1),
        (S.DECODING, "p1", 0),
    ],
    ids=names,
)
def test_a_death_strikes_whoever_was_there(state, dies, strikes):
    bench, request = in_state(state, "p1", "p2", "d1", "d2")
    bench.down(dies)
    assert strikes_of(request) == strikes
    finish(bench, request)


@pytest.mark.parametrize("dies", ["prefill", "decode"])
def test_a_request_that_two_workers_die_of_is_ended_and_nobody_else(dies):
    bench = Bench("p1", "d1", prefill_backlog_tokens=1000)
    poison = bench.submit("poison", max_tokens=TOKENS)
    for n in (2, 3):
        bench.bring(poison, S.PREFILLING)
        bench.up(f"p{n}")
        bench.up(f"d{n}")
        bench.down(poison.prefill_id if dies == "prefill" else poison.decode_id)
    assert isinstance(bench.end(poison), PoisonTrouble)
    assert str(bench.end(poison)) == (
        "2 workers died while they served this request; it is not tried again"
    )
    assert (poison.state, len(bench.dispatcher)) == (S.ENDED, 0)
    finish(bench, bench.submit("other", max_tokens=TOKENS))


def test_the_other_worker_of_a_poisonous_request_is_told_to_let_go():
    bench = Bench("p1", "d1", "d2")
    poison = bench.submit("poison", max_tokens=TOKENS)
    for worker in ("d1", "d2"):
        bench.bring(poison, S.PREFILLING)
        bench.sent.clear()
        bench.down(worker)
    assert bench.cancels() == [("p1", poison.key)]


def test_who_was_beside_the_cause_is_acquitted():
    bench = Bench("d1")
    poison = bench.bring(bench.submit("poison", max_tokens=TOKENS), S.PREFILLING)
    first = bench.bring(bench.submit("first", max_tokens=TOKENS), S.PREFILLING)
    bench.down("d1")
    bench.let_go(first)
    second = bench.submit("second", max_tokens=TOKENS)
    bench.up("d2")
    for request in (poison, second):
        bench.bring(request, S.PREFILLING)
    bench.down("d2")
    assert isinstance(bench.end(poison), PoisonTrouble)
    assert (second.state, second.strikes) == (S.QUEUED, {})
    bench.up("d3")
    finish(bench, second)


def both_struck_twice(*workers: str) -> tuple[Bench, list[Request]]:
    bench = Bench("d1", queue_patience_ms=10, queue_max=50)
    requests = [bench.submit(f"r{n}", max_tokens=TOKENS) for n in range(2)]
    for n in (1, 2):
        for request in requests:
            bench.bring(request, S.PREFILLING)
        bench.down(f"d{n}")
        if n == 1:
            bench.up("d2")
    assert [strikes_of(r) for r in requests] == [2, 2]
    for worker in workers:
        bench.up(worker)
    return bench, requests


def test_where_several_may_be_the_cause_each_goes_on_at_a_worker_of_its_own():
    bench, requests = both_struck_twice("d3", "d4")
    assert {r.decode_id for r in requests} == {"d3", "d4"}
    harmless = [bench.submit(f"other{n}", max_tokens=TOKENS) for n in range(4)]
    assert {r.state for r in harmless} == {S.RESERVING}, "who is no suspect goes anywhere"
    finish(bench, *requests, *harmless)


def test_suspects_that_have_one_worker_take_turns():
    bench, (one, other) = both_struck_twice("d3")
    assert (one.state, other.state) == (S.RESERVING, S.QUEUED)
    bench.expire(1000)
    assert other.state is S.QUEUED, "not even when it has waited for long"
    bench.bring(one, S.DECODING)
    bench.step(one, 2, 12, 13, ending=ENDS_BY_LENGTH)
    assert bench.end(one) is Ending.LENGTH
    finish(bench, other)


def test_suspects_share_no_prefill_worker_until_it_is_done_with_one():
    bench = Bench("p1", "d1", prefill_backlog_tokens=1000)
    requests = [bench.submit(f"r{n}", max_tokens=TOKENS) for n in range(2)]
    for n in (1, 2):
        for request in requests:
            bench.bring(request, S.PREFILLING)
        bench.up(f"d{n + 1}")
        bench.down(f"d{n}")
    one, other = requests
    bench.up("d4")
    assert (one.state, other.state) == (S.RESERVING, S.QUEUED)
    bench.bring(one, S.DECODING)
    assert other.state is S.QUEUED
    bench.handed_off(one)
    assert (other.state, other.prefill_id, one.prefill_id) == (S.RESERVING, "p1", "p1")
    assert other.decode_id != one.decode_id


def test_the_next_death_tells_which_of_the_suspects_it_is():
    bench, (one, other) = both_struck_twice("d3", "d4")
    bench.bring(one, S.PREFILLING)
    bench.down(one.decode_id)
    assert isinstance(bench.end(one), PoisonTrouble)
    assert str(bench.end(one)).startswith("3 workers died")
    assert other.strikes == {}
    finish(bench, other)


def test_a_worker_that_comes_back_as_the_same_instance_has_not_died():
    bench, request = in_state(S.PREFILLING, attempts_max=1)
    for _ in range(5):
        bench.down("d1")
        assert (request.state, strikes_of(request)) == (S.QUEUED, 1)
        bench.up("d1")
        assert (request.state, request.strikes) == (S.RESERVING, {})
        bench.bring(request, S.PREFILLING)
    finish(bench, request)


def test_suspects_of_workers_that_come_back_are_no_suspects():
    bench, (one, other) = both_struck_twice("d2")
    assert [strikes_of(r) for r in (one, other)] == [1, 1]
    assert (one.state, other.state) == (S.RESERVING, S.RESERVING)
    assert one.decode_id == other.decode_id == "d2"
    finish(bench, one, other)


def test_who_goes_on_after_a_death_has_not_caused_it():
    bench = Bench("p1", "d1")
    request = bench.submit(max_tokens=50)
    for n in range(1, 6):
        bench.bring(request, S.DECODING)
        bench.step(request, len(request.answer) - request.base, 11, 12)
        bench.now += bench.config.acquit_ms
        bench.up(f"d{n + 1}")
        bench.down(f"d{n}")
        assert (bench.end(request), strikes_of(request)) == (None, 1)


@pytest.mark.parametrize(("state", "share"), [(S.PREFILLING, 1.0), (S.DECODING, 0.9)])
def test_who_has_not_gone_on_for_long_or_far_is_no_less_suspect(state, share):
    bench = Bench("p1", "d1")
    request = bench.submit(max_tokens=50)
    for n in (1, 2):
        bench.bring(request, state)
        bench.now += bench.config.acquit_ms * share
        bench.up(f"d{n + 1}")
        bench.down(f"d{n}")
    assert isinstance(bench.end(request), PoisonTrouble)


def test_suspects_that_go_on_let_the_others_pass():
    bench, (one, other) = both_struck_twice("d3")
    bench.bring(one, S.DECODING)
    bench.step(one, len(one.answer) - one.base, 11, 12)
    bench.expire(bench.now + bench.config.acquit_ms - 1)
    assert (other.state, strikes_of(one)) == (S.QUEUED, 2)
    bench.expire(bench.now + 1)
    assert (other.state, one.strikes) == (S.RESERVING, {})


def test_workers_that_vanish_before_they_answer_prove_nothing():
    """As when a router is cut off from its workers, and finds one silent after the other."""
    bench = Bench("p1", "d1")
    request = bench.bring(bench.submit(max_tokens=TOKENS), S.DECODING)
    for n in range(1, 7):
        bench.up(f"d{n + 1}")
        bench.down(f"d{n}")
        assert (request.state, request.decode_id) == (S.RESERVING, f"d{n + 1}")
    finish(bench, request)


def test_both_workers_of_a_request_dying_at_once_is_no_proof():
    """As when a host is gone: it is placed again before the other death is known."""
    bench = Bench("p1", "p2", "d1", "d2")
    request = bench.bring(bench.submit(max_tokens=TOKENS), S.PREFILLING)
    bench.down("p1")
    bench.down("d2")
    bench.down("d1")
    assert bench.end(request) is None
    bench.up("d3")
    finish(bench, request)


def test_an_answer_that_is_whole_is_delivered_whatever_it_has_cost():
    bench, request = in_state(S.DECODING, "p1", "d1", strikes_max=1)
    bench.step(request, 2, 12, 13)
    bench.down("d1")
    assert (bench.end(request), bench.seen(request)) == (Ending.LENGTH, [10, 11, 12, 13])


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_poisonous_request_among_others_costs_few_workers_and_no_other_request(workers, step):
    """It kills its decode worker once it has `step` tokens of an attempt; all the others end."""
    bench = Bench(*(f"d{n}" for n in range(workers)), queue_max=50, attempts_max=1)
    innocent = [bench.submit(f"r{n}", max_tokens=TOKENS) for n in range(6)]
    poison = bench.submit("poison", max_tokens=TOKENS + 4)
    innocent += [bench.submit(f"s{n}", max_tokens=TOKENS) for n in range(6)]
    deaths, new = 0, workers
    for _ in range(300):
        for request in (*innocent, poison):
            if bench.end(request) is not None or request.state is S.QUEUED:
                continue
            own = len(request.answer) - request.base
            if request is poison and request.state is not S.RESERVING and own >= step:
                deaths += 1
                bench.up(f"d{new}")
                new += 1
                bench.down(poison.decode_id)
            elif request is poison and request.state is S.DECODING:
                bench.step(request, own, 50 + own)
            elif request is poison and request.state is S.PREFILLING:
                bench.step(request, 0, 50)
            else:
                work(bench, request)
    assert isinstance(bench.end(poison), PoisonTrouble)
    assert deaths <= 3
    for request in innocent:
        assert (bench.seen(request), bench.end(request)) == ([10, 11, 12, 13], Ending.LENGTH)
    assert len(bench.dispatcher) == 0


def test_failures_that_workers_report_are_still_counted():
    bench, request = in_state(S.PREFILLING, attempts_max=2)
    bench.p_fails(request, pb.FAILURE_CODE_INTERNAL)
    bench.d_fails(request, pb.FAILURE_CODE_INTERNAL)
    assert isinstance(bench.end(request), UnavailableTrouble)
