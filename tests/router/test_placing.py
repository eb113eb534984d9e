"""Who waits is looked at only when it may find a place, and finds it all the same."""

import random
from typing import Any

import pytest
from dispatcher_bench import Bench, S

from kvrelay.wire import worker_pb2 as pb
from router.choosing import Choosing
from router.request import Request
from router.workers import Workers

MANY = {"queue_max": 1000, "queue_patience_ms": 10**6}
SEEDS = 150
TARGETS = {"ttft_target_ms": 1000.0, "tpot_target_ms": 100.0}


@pytest.fixture
def tries(monkeypatch) -> list[str]:
    """The names of those that a place was looked for, in order."""
    names: list[str] = []
    choose = Choosing.choose

    def counted(self: Choosing, request: Any, *args: Any) -> Any:
        names.append(request.request_id)
        return choose(self, request, *args)

    monkeypatch.setattr(Choosing, "choose", counted)
    return names


def full(waiting: int, **config: Any) -> Bench:
    """Nobody has room, and so many wait."""
    bench = Bench("p1", "p2", "d1", "d2", blocks=200, **{**MANY, **config})
    bench.d("d1", free=1)
    bench.d("d2", free=1)
    for number in range(waiting):
        bench.submit(f"r{number}", prompt=30)
    assert bench.dispatcher.queued == waiting
    return bench


@pytest.mark.parametrize("targets", [{}, TARGETS], ids=["", "targets"])
@pytest.mark.parametrize("waiting", [10, 300])
def test_an_event_that_makes_room_for_nobody_has_nobody_looked_at(waiting, targets, tries):
    bench = full(waiting, **targets)
    tries.clear()
    for free in (2, 5, 3, 7, 0, 8):
        bench.d("d1", free=free)
    bench.p("p1", queued=10)
    bench.p("p1", queued=0)
    for number in range(20):
        bench.submit(f"new{number}", prompt=30)
    assert tries == []


@pytest.mark.parametrize("targets", [{}, TARGETS], ids=["", "targets"])
@pytest.mark.parametrize("waiting", [10, 300])
def test_room_for_one_is_offered_to_the_first(waiting, targets, tries):
    bench = full(waiting, **targets)
    if targets:  # what their prompts take is looked up once for each that is looked at
        bench.d("d1", free=9)
        bench.d("d1", free=0)
    placed = bench.dispatcher.queued
    tries.clear()
    bench.d("d2", free=9)
    assert bench.dispatcher.queued == placed - 1
    assert tries[-1] in ("r0", "r1")
    assert len(tries) <= 2, "and one that is among the first now"


def test_a_busy_prefill_worker_that_takes_nothing_yet_has_nobody_looked_at(tries):
    bench = Bench(blocks=4000, **MANY, **TARGETS)
    bench.p(queued=5000)
    for number in range(100):
        bench.submit(f"r{number}", prompt=300)
    tries.clear()
    for queued in (4000, 2000, 300):
        bench.p(queued=queued)
    assert tries == []
    bench.p(queued=200)
    assert bench.reserves()


def test_one_look_tries_only_a_few(tries):
    bench = Bench(blocks=400, queue_lookahead=8, **MANY)
    bench.p(queued=40)  # of 50 at most
    for number in range(20):
        bench.submit(f"long{number}", prompt=20)
    tries.clear()
    bench.submit("long", prompt=20)
    assert tries == [f"long{number}" for number in range(8)]


def test_those_who_are_tried_in_vain_count_among_those_who_are_looked_at():
    """Or many short prompts would always go before a long one that others would wait for."""
    bench = Bench(blocks=400, queue_lookahead=3, **MANY)
    bench.p(queued=40)
    for number in range(3):
        bench.submit(f"long{number}", prompt=20)
    assert bench.submit("short", prompt=8).state is S.QUEUED


def who_waits_for_a_fast_worker(bench: Bench) -> Request:
    """It waits for p1, which has a backlog; p2 takes anything and is slow."""
    for worker, queued, token_ms in (("p1", 60, 0.1), ("p2", 0, 10.0)):
        cost = pb.StepCost(base_ms=1, ms_per_prompt_token=token_ms)
        load = pb.PrefillLoad(queued_tokens=queued, cost=cost)
        event = pb.PrefillEvent(load=load)
        bench.take(bench.dispatcher.on_prefill_event(worker, event, 0))
    waits = bench.submit("waits", prompt=40)
    assert waits.state is S.QUEUED
    return waits


@pytest.mark.parametrize("how", ["down", "drain", "refuses", "fails"])
def test_who_waits_for_a_worker_that_takes_nothing_any_more_goes_elsewhere_at_once(how):
    bench = Bench("p1", "p2", "d1", blocks=400, **MANY)
    waits = who_waits_for_a_fast_worker(bench)
    if how == "down":
        bench.down("p1")
    elif how == "drain":
        bench.drain("p1")
    elif how == "refuses":
        failed = pb.Failed(key=99, code=pb.FAILURE_CODE_EXHAUSTED)
        bench.p("p1", queued=60, failed=failed)
    else:
        bench.dispatcher.workers.failed("p1", bench.now)
        bench.take([])
    assert waits.prefill_id == "p2"


def test_who_waits_for_a_worker_that_gets_busier_goes_elsewhere_at_the_next_look():
    bench = Bench("p1", "p2", "d1", blocks=400, **MANY)
    waits = who_waits_for_a_fast_worker(bench)
    bench.p("p1", queued=9000)
    bench.expire(500)
    assert waits.prefill_id == "p2"


@pytest.mark.parametrize("how", ["running", "rates"])
def test_a_worker_that_begins_to_take_answers_has_who_waits_looked_at_at_once(how):
    """With no more room than it had."""
    bench = Bench(blocks=4000, **MANY, **TARGETS)

    def d(running: int, sequence_ms: float) -> None:
        cost = pb.StepCost(base_ms=5, ms_per_prompt_token=0.5, ms_per_sequence=sequence_ms)
        load = pb.DecodeLoad(blocks_free=4000, running=running, cost=cost)
        bench.take(bench.dispatcher.on_decode_event("d1", pb.DecodeEvent(load=load), bench.now))

    d(running=20, sequence_ms=10)
    waits = bench.submit("waits", prompt=30)
    assert waits.state is S.QUEUED, "d1 would be late with all its answers"
    if how == "running":
        d(running=2, sequence_ms=10)
    else:
        d(running=20, sequence_ms=1)
    assert waits.state is S.RESERVING


def who_is_kept_from_a_worker(bench: Bench) -> tuple[Request, Request]:
    """One for whom p1 is kept, and one that would fit there."""
    bench.p(queued=20)
    long = bench.submit("long", prompt=40)
    bench.expire(101)
    short = bench.submit("short", prompt=8)
    assert (long.state, short.state) == (S.QUEUED, S.QUEUED)
    return long, short


@pytest.mark.parametrize("how", ["reserved", "let go"])
def test_a_hold_whose_request_is_elsewhere_keeps_nobody_waiting(how):
    bench = Bench("p1", "d1", "d2", queue_patience_ms=100)
    long, short = who_is_kept_from_a_worker(bench)
    bench.p(queued=0)
    bench.p(queued=41)
    failed = pb.Failed(key=99, code=pb.FAILURE_CODE_EXHAUSTED)
    bench.d(long.decode_id, free=80, failed=failed)  # of another: its room makes no difference now
    assert (long.state, short.state) == (S.RESERVING, S.QUEUED)
    if how == "reserved":
        bench.reserved(long, free=70)
    else:
        bench.let_go(long)
    assert short.state is S.RESERVING


def test_a_hold_that_has_lasted_its_time_ends_with_the_next_event():
    bench = Bench(queue_patience_ms=100, queue_hold_ms=50)
    _, short = who_is_kept_from_a_worker(bench)
    bench.now = 150
    bench.p(queued=20)
    assert short.state is S.QUEUED
    bench.now = 151
    bench.p(queued=20)
    assert short.state is S.RESERVING


def test_time_alone_has_one_looked_at_again_that_is_late_where_it_waits():
    """With nothing heard: the next that comes is reason enough to look."""
    bench = Bench(blocks=4000, local_prefill="auto", **MANY, **TARGETS)
    cost = pb.StepCost(base_ms=5, ms_per_prompt_token=1.0, ms_per_sequence=5)
    bench.take(
        bench.dispatcher.on_prefill_event(
            "p1", pb.PrefillEvent(load=pb.PrefillLoad(queued_tokens=300, cost=cost)), 0
        )
    )
    load = pb.DecodeLoad(blocks_free=4000, running=16, cost=cost)
    bench.take(bench.dispatcher.on_decode_event("d1", pb.DecodeEvent(load=load), 0))
    waits = bench.submit("waits", prompt=200)
    assert waits.state is S.QUEUED, "d1 would be late with it, p1 would not"
    bench.now = 600
    bench.submit("new", prompt=200)
    assert (waits.state, waits.prefill_here) == (S.RESERVING, True)


def _played(seed: int, targets: dict[str, float], *, checked: bool) -> list[Any]:
    """What was asked of whom, in a cluster that has too much to do."""
    dice = random.Random(seed)
    config = {**MANY, "queue_patience_ms": 300, "late_wait_ms": 400, **targets}
    config["local_prefill"] = dice.choice(("auto", "never"))
    bench = Bench("p1", "p2", "d1", "d2", blocks=60, **config)
    if not checked:
        bench.dispatcher.check = lambda: None  # type: ignore[method-assign]
    requests = []
    for number in range(120):
        bench.now += dice.randrange(0, 40)
        free, worker = dice.randrange(0, 60), dice.choice("12")
        sequence_ms = dice.choice((4, 4, 12))
        cost = pb.StepCost(base_ms=5, ms_per_prompt_token=0.5, ms_per_sequence=sequence_ms)
        what = dice.randrange(6)
        if what < 2:
            requests.append(bench.submit(f"r{number}", prompt=dice.randrange(1, 120)))
        elif what == 2:
            load = pb.PrefillLoad(queued_tokens=dice.choice((0, 0, 40, 300)), cost=cost)
            event = pb.PrefillEvent(load=load)
            bench.take(bench.dispatcher.on_prefill_event(f"p{worker}", event, bench.now))
        elif what == 3:
            running = dice.randrange(0, 20)
            load_d = pb.DecodeLoad(blocks_free=free, running=running, cost=cost)
            event_d = pb.DecodeEvent(load=load_d)
            bench.take(bench.dispatcher.on_decode_event(f"d{worker}", event_d, bench.now))
        elif what == 4 and requests:
            bench.let_go(requests.pop(dice.randrange(len(requests))))
        else:
            bench.expire(bench.now)
    return [(name, r.request_id, r.attempt) for name, r in bench.reserves()]


@pytest.mark.parametrize("seeds", [range(first, first + 10) for first in range(0, SEEDS, 10)])
@pytest.mark.parametrize("targets", [{}, TARGETS], ids=["", "targets"])
def test_a_look_that_is_spared_would_have_found_nothing(seeds, targets, monkeypatch):
    """Beside a router that looks at who waits whenever it is asked to, whatever workers take."""
    spared = [_played(seed, targets, checked=True) for seed in seeds]
    assert all(spared)
    monkeypatch.setattr(Workers, "may_take", lambda *_: True)
    assert spared == [_played(seed, targets, checked=False) for seed in seeds]
