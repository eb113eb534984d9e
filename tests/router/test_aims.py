"""Who goes first where first tokens have a target, in the dispatcher and by itself."""

from itertools import permutations
from typing import Any

from dispatcher_bench import Bench, S, make
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.wire import worker_pb2 as pb
from router.aims import Aims

TOKEN_MS = 1.0


def bench(*workers: str, **config: Any) -> Bench:
    """Workers compute a prompt's token in a millisecond."""
    made = Bench(
        *workers or ("p1", "d1"),
        blocks=4000,
        **{"ttft_target_ms": 1000 / 0.95, "queue_max": 64, **config},
    )
    cost = pb.StepCost(base_ms=1.0, ms_per_prompt_token=TOKEN_MS, ms_per_sequence=0.1)
    for name in made.dispatcher.workers.prefill:
        load = pb.PrefillLoad(cost=cost)
        made.dispatcher.on_prefill_event(name, pb.PrefillEvent(load=load), 0.0)
    for name in made.dispatcher.workers.decode:
        load_d = pb.DecodeLoad(blocks_free=4000, cost=cost)
        made.dispatcher.on_decode_event(name, pb.DecodeEvent(load=load_d), 0.0)
    return made


def aims_of(made: Bench) -> Aims:
    return Aims(made.config, made.dispatcher.workers)


def order(made: Bench, *waiting: Any, now_ms: float = 0.0) -> list[str]:
    return [request.request_id for request in aims_of(made).in_order(waiting, now_ms)]


def waiting(name: str, prompt: int, came_ms: float = 0.0, **more: Any) -> Any:
    request = make(name, prompt=prompt, now=came_ms, **more)
    request.queued_at_ms = came_ms
    return request


def test_without_targets_nothing_changes():
    plain = bench(ttft_target_ms=0.0)
    requests = [waiting("a", 900), waiting("b", 900), waiting("c", 10)]
    assert order(plain, *requests) == ["a", "b", "c"]
    assert aims_of(plain).of(requests[0], 5.0) is None


def test_who_all_are_in_time_keep_their_order():
    assert order(bench(), waiting("a", 500), waiting("b", 100), waiting("c", 300)) == [
        "a",
        "b",
        "c",
    ]


def test_the_longest_is_late_where_somebody_must_be():
    assert order(bench(), waiting("a", 600), waiting("b", 300), waiting("c", 300)) == [
        "b",
        "c",
        "a",
    ]


def test_who_is_late_already_waits_for_those_who_are_not():
    made = bench()
    late, in_time = waiting("late", 10), waiting("b", 300, came_ms=990)
    assert order(made, late, in_time, now_ms=1000) == ["b", "late"]


def test_the_least_urgent_are_late_first():
    urgent, other = waiting("urgent", 700, priority=-1), waiting("other", 400)
    assert order(bench(), urgent, other) == ["urgent", "other"]
    assert order(bench(), waiting("long", 700), other) == ["other", "long"]


def test_who_has_waited_for_too_long_goes_first_late_or_not():
    made = bench(late_wait_ms=2000)
    old = waiting("old", 900)
    new = [waiting("b", 300, came_ms=2400), waiting("c", 300, came_ms=2400)]
    assert order(made, old, *new, now_ms=1900) == ["b", "c", "old"]
    assert order(made, old, *new, now_ms=2500) == ["old", "b", "c"]


def test_who_has_its_first_token_is_never_late():
    going_on, new = waiting("going on", 900), waiting("b", 300, came_ms=4900)
    going_on.times.first_token_at_ms = 400.0
    going_on.queued_at_ms = 4900.0  # its worker was lost then
    assert order(bench(), going_on, new, now_ms=5000) == ["going on", "b"]


def test_more_workers_have_time_for_more():
    requests = [waiting("a", 600), waiting("b", 300), waiting("c", 300)]
    assert order(bench("p1", "p2", "d1"), *requests) == ["a", "b", "c"]


def test_who_is_late_whatever_happens_makes_nobody_late():
    """Of one level, a deadline of its own comes first, also of who came later."""
    made = bench(queue_aging_ms=60_000)
    due = waiting("due", 500, came_ms=1900, ttft_deadline_ms=900)
    late = waiting("late", 400, came_ms=0)
    assert order(made, due, waiting("b", 300, came_ms=1900), late, now_ms=1950) == [
        "due",
        "b",
        "late",
    ]


def test_who_goes_first_takes_time():
    """Then the longer of the two others is late, where both would be in time without it."""
    made = bench(late_wait_ms=2000)
    old = waiting("old", 300)
    new = [waiting("b", 500, came_ms=2400), waiting("c", 200, came_ms=2400)]
    assert order(made, old, *new, now_ms=2500) == ["old", "c", "b"]


def test_a_decode_worker_without_time_for_prompts_does_not_count():
    """Else the prompts before it at the prefill worker would count twice."""
    made = bench("p1", "d1", local_prefill="auto", tpot_target_ms=1.0)
    workers = made.dispatcher.workers
    workers.prefill["p1"].queued_tokens = 400
    workers.decode["d1"].running = 10
    assert aims_of(made)._pace() == (TOKEN_MS, 400 * TOKEN_MS)


@given(st.lists(st.integers(1, 900), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_as_many_are_in_time_as_can_be(prompts):
    requests = [waiting(str(n), tokens) for n, tokens in enumerate(prompts)]

    def in_time(some: Any) -> int:
        at_ms, count = 0.0, 0
        for request in some:
            at_ms += request.prompt_tokens_now * TOKEN_MS
            count += at_ms <= 1000
        return count

    best = max(map(in_time, permutations(requests)))
    assert in_time(aims_of(bench()).in_order(requests, 0.0)) == best


# ---- in the dispatcher


def test_a_late_request_is_placed_when_nobody_else_waits():
    made = bench()
    first = made.submit("r1", prompt=400)
    long, short = made.submit("r2", prompt=900), made.submit("r3", prompt=300)
    assert (long.state, short.state) == (S.QUEUED, S.QUEUED)
    made.now = 400.0
    made.bring(first, S.DECODING)
    made.take(made.dispatcher.pump(made.now))
    assert (long.state, short.state) == (S.QUEUED, S.RESERVING)
    made.bring(short, S.DECODING)
    made.take(made.dispatcher.pump(made.now))
    assert long.state is S.RESERVING


def test_no_worker_is_kept_for_who_is_late():
    made = bench(queue_patience_ms=100, late_wait_ms=5000)
    made.submit("r1", prompt=400)
    made.submit("r2", prompt=400)
    late = made.submit("r3", prompt=900)
    made.expire(4000.0)
    assert made.dispatcher._placing.hold.worker_id == ""
    made.expire(5001.0)
    assert (late.state, made.dispatcher._placing.hold.worker_id) == (S.QUEUED, "p1")


def test_late_ones_do_not_hide_who_is_in_time():
    """Under overload there are more of them than are looked at in one go, and they came first."""
    made = bench(queue_scan_max=3)
    first = made.submit("r0", prompt=400)
    late = [made.submit(f"late{n}", prompt=900) for n in range(5)]
    made.now = 1500.0
    new = made.submit("new", prompt=300)
    made.bring(first, S.DECODING)
    made.take(made.dispatcher.pump(made.now))
    assert [request.state for request in late] == [S.QUEUED] * 5
    assert new.state is S.RESERVING
