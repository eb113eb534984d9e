from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_fixtures import sampling

from decode_worker.batch import Running
from decode_worker.slack import _PAUSE_SHARE, ENDLESS, Slack, step_room
from kvrelay.config import TPOT_SHARE
from kvrelay.engine.step_cost import StepCost, StepFit

TARGET_MS = 10 / TPOT_SHARE  # of which 10 ms are for steps
PLAIN_MS = 6.0


def fit_of(per_sequence_ms: float = 0.0) -> StepFit:
    fit = StepFit()
    fit.cost = StepCost(PLAIN_MS - per_sequence_ms, 1.0, per_sequence_ms)  # 6 ms for one answer
    return fit


def answer(tokens: int, begun_ms: float, max_tokens: int = 50) -> Running:
    return Running(("r", 1), 8, sampling(max_tokens), [], answer=[0] * tokens, begun_ms=begun_ms)


def left_ms(*running: Running, now_ms: float = 1000.0, fit: StepFit | None = None, **more) -> float:
    return step_room(running, now_ms, TARGET_MS, fit or fit_of(), **more).left_ms


def test_a_new_answer_leaves_a_step_of_the_target():
    assert left_ms(answer(1, begun_ms=1000)) == pytest.approx(10)


def test_an_answer_can_afford_what_it_has_saved():
    # 20 tokens after its first in 6 ms each: 4 ms of each are left.
    assert left_ms(answer(21, begun_ms=1000 - 20 * 6)) == pytest.approx(10 + 20 * 4)


def test_one_that_was_held_up_leaves_less_than_nothing_until_it_has_caught_up():
    assert left_ms(answer(2, begun_ms=1000 - 40)) == pytest.approx(20 - 40)


def test_the_poorest_decides():
    rich, poor = answer(21, begun_ms=1000 - 120), answer(3, begun_ms=1000 - 20)
    assert left_ms(rich, poor) == left_ms(poor) == pytest.approx(10)


def test_who_can_not_meet_the_target_any_more_has_nothing_to_lose():
    lost = answer(49, begun_ms=1000 - 600)
    assert left_ms(lost) == inf
    assert left_ms(lost, answer(1, begun_ms=1000)) == pytest.approx(10)


def test_without_answers_there_is_no_bound():
    assert step_room([], 1000.0, TARGET_MS, fit_of()) == ENDLESS


def test_answers_keep_what_they_will_need_when_others_have_joined():
    running = answer(21, begun_ms=1000 - 20 * 6)  # 90 ms to spare, 28 tokens after this step
    fit = fit_of(per_sequence_ms=2.0)
    assert left_ms(running, fit=fit, coming=1) == pytest.approx(90)  # three take 10 ms a step
    assert left_ms(running, fit=fit, coming=2) == pytest.approx(90 - 28 * 2)


def test_where_answers_may_join_no_step_holds_them_up_for_long():
    def most_ms(*running: Running, spare: float, coming: int = 0) -> float:
        target_ms = (PLAIN_MS + spare) / TPOT_SHARE
        return step_room(running, 0.0, target_ms, fit_of(), receives=True, coming=coming).most_ms

    assert most_ms(answer(1, begun_ms=0), spare=4) == pytest.approx(10 + 4 * 4)
    assert most_ms(coming=1, spare=4) == pytest.approx(10 + 4 * 4)
    assert most_ms(spare=4) == 50  # whoever is not expected yet comes later than that
    assert most_ms(spare=100) == pytest.approx(106 + 4 * 100)


@given(
    chunk_ms=st.floats(1, 60),
    max_tokens=st.integers(2, 60),
    joins=st.lists(st.integers(0, 40), max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_no_answer_misses_the_target_because_of_chunks(chunk_ms, max_tokens, joins):
    """Steps of 6 ms, and 6 ms with a chunk wherever the rule allows one."""
    now_ms, running, ended = 0.0, [answer(1, 0.0, max_tokens)], []
    for step in range(200):
        running += [answer(1, now_ms, max_tokens) for join in joins if join == step]
        with_chunk = PLAIN_MS + chunk_ms
        affords = with_chunk <= left_ms(*running, now_ms=now_ms)
        now_ms += with_chunk if affords else PLAIN_MS
        for one in running:
            one.answer.append(0)
            assert now_ms - one.begun_ms <= (len(one.answer) - 1) * TARGET_MS
        ended += [one for one in running if len(one.answer) == max_tokens]
        running = [one for one in running if len(one.answer) < max_tokens]
        if not running:
            break
    assert ended


# ---- pauses


def pause_ms(
    *running: Running, target_ms: float = 10 / _PAUSE_SHARE, last_ended_ms: float = 1000.0
) -> float:
    """Now is 1000."""
    return Slack(target_ms).pause_ms(running, 1000.0, fit_of(), 0, last_ended_ms)


def test_a_step_may_wait_until_it_ends_in_time():
    assert pause_ms(answer(1, begun_ms=1000)) == pytest.approx(10 - PLAIN_MS)
    assert pause_ms(answer(1, begun_ms=1000), answer(1, begun_ms=997)) == pytest.approx(1)


def test_a_step_that_is_late_does_not_wait():
    assert pause_ms(answer(2, begun_ms=1000 - 40)) == 0


def test_what_was_saved_makes_no_gap_longer_than_the_target():
    rich = answer(21, begun_ms=1000 - 20 * 6)
    assert pause_ms(rich) == pytest.approx(10 - PLAIN_MS)
    assert pause_ms(rich, last_ended_ms=998.0) == pytest.approx(8 - PLAIN_MS), "asked again"
    assert pause_ms(rich, last_ended_ms=900.0) == 0


def test_no_step_waits_for_those_who_have_nothing_to_lose_nor_without_a_target():
    assert pause_ms(answer(49, begun_ms=1000 - 600)) == 0
    assert pause_ms(answer(1, begun_ms=1000), target_ms=0) == 0
    assert pause_ms() == 0
