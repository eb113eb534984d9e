import itertools
from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import router_config

from router.admission import Sampling
from router.queue import WaitingQueue
from router.request import Request, Times

AGING_MS = 100
_SAMPLING = Sampling(0.0, 0, 1.0, 0, 4, (), ())
_numbers = itertools.count(1)


def request(
    priority: int = 0, arrived_at_ms: float = 0, deadline_ms: int = 0, key: int = 0
) -> Request:
    made = Request(
        "r",
        [1],
        _SAMPLING,
        Times(arrived_at_ms),
        priority=priority,
        ttft_deadline_ms=deadline_ms,
        number=next(_numbers),
        key=key,
    )
    made.queued_at_ms = arrived_at_ms
    return made


def queue_of(*requests: Request, **config: Any) -> WaitingQueue:
    queue = WaitingQueue(
        router_config(**{"queue_aging_ms": AGING_MS, "queue_lookahead": 1000, **config})
    )
    for one in requests:
        queue.push(one)
    return queue


def test_lower_priorities_go_first_then_earlier_deadlines_then_who_came_first():
    late, first, second = request(1), request(), request()
    due, sooner = request(deadline_ms=50), request(deadline_ms=40)
    queue = queue_of(late, first, second, due, sooner)
    assert queue.heads() == [sooner, due, first, second, late]
    queue.check()


def test_who_was_placed_before_goes_before_everybody():
    again, urgent = request(priority=100, key=7), request(priority=-100)
    assert queue_of(urgent, again).heads() == [again, urgent]


def test_a_period_of_waiting_is_worth_a_step_of_priority():
    waited = request(priority=3, arrived_at_ms=50)
    for arrived_at_ms, before in ((250, True), (350, False), (450, False)):
        new = request(arrived_at_ms=arrived_at_ms)
        assert (queue_of(waited, new).heads()[0] is new) == before


def test_a_deadline_counts_no_more_once_the_first_token_is_there():
    due = request(deadline_ms=50)
    assert due.deadline_at_ms == 50
    due.times.first_token_at_ms = 20
    assert due.deadline_at_ms == inf


def test_only_so_many_are_looked_at():
    requests = [request() for _ in range(5)]
    assert queue_of(*requests, queue_scan_max=2).heads() == requests[:2]


def test_a_wait_is_what_those_ahead_have_been_seen_to_take():
    requests = [request() for _ in range(4)]
    queue = queue_of(*requests)
    new, urgent = request(arrived_at_ms=90), request(priority=-1, arrived_at_ms=90)
    assert (queue.wait_ms(new, 7.0), queue.all_ms()) == (28.0, None), "nobody has left yet"
    assert queue.wait_ms(urgent, 7.0) == 0
    queue.depart(requests[0], 50)
    queue.depart(requests[1], 100)
    assert (queue.wait_ms(new, 7.0), queue.all_ms()) == (100.0, 100.0)


def test_who_does_not_wait_says_nothing_of_how_long_others_will():
    one, other = request(), request()
    queue = queue_of(one, other)
    queue.depart(one, 0)
    assert queue.all_ms() is None


def test_changes_are_noticed():
    queue, one = queue_of(), request()
    for change, *now in ((queue.push,), (queue.depart, 1.0)):
        queue.changed = False
        change(one, *now)
        assert queue.changed


def test_time_in_which_nobody_waited_to_leave_is_no_wait():
    large = request()
    queue = queue_of(large)
    for arrived_at_ms in (1900, 2900):
        small = request(arrived_at_ms=arrived_at_ms)
        queue.push(small)
        queue.depart(small, arrived_at_ms + 1)
        assert queue.all_ms() == 1.0, "of the large one"


def test_who_is_overtaken_is_not_waited_for():
    large, small = request(), request()
    queue = queue_of(large, small, request())
    new = request(arrived_at_ms=50)
    assert queue.wait_ms(new, 7.0) == 21.0
    queue.depart(small, 20)
    queue.check()
    assert queue.wait_ms(new, 7.0) == 20.0, "for the third alone"
    queue.depart(large, 40)
    queue.check()
    assert queue.wait_ms(new, 7.0) == 20.0


def test_an_empty_queue_forgets_how_slow_it_was():
    one, other = request(), request(arrived_at_ms=600)
    queue = queue_of(one)
    queue.depart(one, 500)
    queue.push(other)
    assert queue.all_ms() is None


requests_ = st.lists(
    st.builds(
        request,
        st.integers(-100, 100),
        st.integers(0, 5000).map(float),
        st.sampled_from((0, 0, 100, 1000)),
    ),
    max_size=30,
)


@given(requests=requests_)
@settings(deadline=None)
def test_nobody_is_lost_or_doubled_and_equals_keep_their_order(requests):
    requests.sort(key=lambda r: r.times.arrived_at_ms)
    for number, one in enumerate(requests):
        one.number = number
    queue = queue_of(*requests)
    order = []
    while queue.heads():
        order.append(queue.heads()[0])
        queue.depart(order[-1], 1e9)
        queue.check()
    assert len(order) == len(requests)
    assert set(order) == set(requests)
    for one, other in itertools.combinations(order, 2):
        if one.priority == other.priority and one.deadline_at_ms == other.deadline_at_ms:
            assert one.number < other.number


@given(requests=requests_)
@settings(deadline=None)
def test_nobody_is_overtaken_by_who_came_more_periods_later_than_their_priorities_differ(requests):
    order = queue_of(*requests).heads()
    for one, other in itertools.combinations(order, 2):
        periods = (one.times.arrived_at_ms - other.times.arrived_at_ms) / AGING_MS
        assert periods < other.priority - one.priority + 1


@given(
    requests=st.lists(
        st.builds(
            request,
            st.integers(-3, 3),
            st.integers(0, 900).map(float),
            st.sampled_from((0, 0, 100, 1000)),
        ),
        max_size=30,
    ),
    times=st.lists(st.integers(0, 3000).map(float), min_size=1, max_size=5).map(sorted),
    most=st.integers(1, 8),
)
@settings(deadline=None)
def test_as_many_late_ones_are_looked_at_beside_those_in_time(requests, times, most):
    queue = queue_of(*requests, ttft_target_ms=500 / 0.95, late_wait_ms=800, queue_scan_max=most)

    def is_late(one: Request, now_ms: float) -> bool:
        due_ms = min(one.times.arrived_at_ms + 500, one.deadline_at_ms)
        return due_ms < now_ms <= one.times.arrived_at_ms + 800

    for now_ms in times:
        waiting = list(queue._order.values())
        late = [one for one in waiting if is_late(one, now_ms)][:most]
        in_time = [one for one in waiting if not is_late(one, now_ms)][:most]
        assert queue.heads_and_late(now_ms) == [
            one for one in waiting if one in late or one in in_time
        ]
        queue.check()
        if waiting:
            queue.depart(waiting[len(waiting) // 2], now_ms)


def test_who_comes_back_is_late_by_its_new_wait():
    one, other = request(), request()
    queue = queue_of(one, other, ttft_target_ms=100, late_wait_ms=1000, queue_scan_max=1)
    assert queue.heads_and_late(500) == [one]
    queue.remove(one)
    one.queued_at_ms = 5000
    queue.push(one)
    assert queue.heads_and_late(5100) == [one, other], "only the other has waited for so long"
    queue.check()


def test_what_all_who_wait_have_in_common():
    queue = queue_of(request(arrived_at_ms=7), request(arrived_at_ms=3), queue_patience_ms=10)
    assert (queue.tokens, queue.began_ms) == ((5, 5), 3)
    assert (queue.any_impatient(13), queue.any_impatient(14)) == (False, True)
