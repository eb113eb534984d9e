"""Placement where requests have targets: what is good for goodput."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.config import TPOT_SHARE
from router.policy import Aim, Wish, place
from router.prediction import (
    DecodeView,
    PrefillView,
    Rates,
    aimed_chunk,
    aimed_local_ms,
    prompt_share,
)

RATES = Rates(base_ms=8.0, prompt_token_ms=1.0, sequence_ms=1.0)
ROOMY = Aim(ttft_left_ms=5000.0, tpot_ms=100.0)


def p(name: str = "p1", queued: int = 0, prompts: int = 0, **more) -> PrefillView:
    return PrefillView(name, queued, 1000, 4, RATES, queued_prompts=prompts, **more)


def d(name: str = "d1", decoding: int = 0, coming: int = 0, **more) -> DecodeView:
    sequences = decoding + coming
    return DecodeView(name, 1000, sequences, 4, RATES, decoding=decoding, **more)


def placed(prefill, decode, aim: Aim = ROOMY, prompt: int = 100, *, local: bool = True):
    """The pair, and whether it takes the request now."""
    wish = Wish(prompt, 16, 4096, local=local, aim=aim)
    choice = place(prefill, decode, wish)
    return (*choice.placement.pair, choice.now) if choice else None


def test_a_prompt_goes_where_it_is_done_sooner_and_chunks_on_d_harm_nobody():
    assert placed([p()], [d(decoding=5)]) == ("p1", "d1", True)
    assert placed([p(queued=300, prompts=1)], [d(decoding=5)]) == (None, "d1", True)


def test_a_prompt_does_not_wait_while_d_meets_its_targets():
    busy = [p(queued=300, prompts=1)]
    assert placed(busy, [d(decoding=5)], Aim(5000, 30), prompt=200) == (None, "d1", True)


def test_it_waits_for_p_where_d_would_miss_a_target():
    busy = [p(queued=300, prompts=1)]
    slow = d(decoding=5)  # 13 ms a step leave little of 16
    assert placed(busy, [slow], Aim(600, 16), prompt=200) == ("p1", "d1", False)
    assert placed(busy, [slow], Aim(9000, 16), prompt=200) == (None, "d1", True)


def test_who_is_late_everywhere_goes_where_it_is_taken():
    busy = [p(queued=300, prompts=1)]
    assert placed(busy, [d(decoding=5)], Aim(-1, 30), prompt=200) == (None, "d1", True)


@pytest.mark.parametrize(("queued", "takes"), [(0, True), (256, True), (257, False)])
def test_a_prefill_worker_gets_its_next_prompt_for_its_last_step(queued, takes):
    found = placed([p(queued=queued, prompts=1)], [d()], prompt=500, local=False)
    assert found == ("p1", "d1", takes)


def test_a_decode_worker_takes_prompts_for_two_steps():
    loose, tight = Aim(9000, 500), Aim(9000, 30)
    assert placed([], [d(decoding=5, queued_tokens=300, queued_prompts=1)], loose)[2]
    assert not placed([], [d(decoding=5, queued_tokens=300, queued_prompts=1)], tight)[2]
    assert placed([], [d(decoding=5)], tight)[2]


def test_no_answer_goes_where_it_makes_others_late():
    aim = Aim(9000, 15)
    assert placed([p()], [d(decoding=6)], aim) == ("p1", "d1", True)
    assert placed([p()], [d(decoding=7)], aim) == ("p1", "d1", False)
    assert placed([p()], [d(decoding=7), d("d2", decoding=3)], aim)[1:] == ("d2", True)


def test_answers_whose_prompts_are_still_computed_take_no_time_of_steps():
    assert placed([p()], [d(decoding=5, coming=9)], Aim(9000, 15))[2]


def test_a_target_that_no_step_can_meet_does_not_make_answers_come_one_by_one():
    assert placed([p()], [d(decoding=30)], Aim(9000, 5)) == ("p1", "d1", True)


def test_failures_count_before_targets():
    wish = Wish(100, 16, 4096, {"d1": 1}, aim=Aim(9000, 15))
    assert place([p()], [d("d1"), d("d2", decoding=20)], wish).placement.decode == "d2"


# ---- the formulas


def test_prompts_get_what_answers_leave_of_their_target():
    assert prompt_share(RATES, 0, 20) == prompt_share(RATES, 9, 0) == 1
    assert prompt_share(RATES, 2, 20 / TPOT_SHARE) == pytest.approx(0.5)
    assert prompt_share(RATES, 20, 20) == 0


def test_a_chunk_fills_the_step_up_to_the_target():
    assert aimed_chunk(d(decoding=2), 20 / TPOT_SHARE) == pytest.approx(10)
    assert aimed_chunk(d(decoding=20), 20) == 1
    assert aimed_chunk(d(decoding=2), 9000) == aimed_chunk(d(), 20) == 256


def test_a_prompt_takes_as_many_steps_as_its_chunks():
    worker = d(decoding=2)
    assert aimed_local_ms(worker, 100, 20 / TPOT_SHARE) == pytest.approx(10 * 10 + 100)
    assert aimed_local_ms(d(), 256, 20) == 8 + 256


@given(
    prefill=st.lists(
        st.builds(p, st.sampled_from("abc"), st.integers(0, 600), st.integers(0, 3)), max_size=3
    ),
    decode=st.lists(
        st.builds(d, st.sampled_from("xyz"), st.integers(0, 20), st.integers(0, 3)),
        min_size=1,
        max_size=3,
    ),
    left_ms=st.sampled_from((-100.0, 50.0, 500.0, inf)),
    tpot_ms=st.sampled_from((0.0, 5.0, 12.0, 100.0)),
)
@settings(max_examples=200, deadline=None)
def test_idle_workers_always_take_a_request(prefill, decode, left_ms, tpot_ms):
    choice = place(prefill, decode, Wish(100, 16, 4096, aim=Aim(left_ms, tpot_ms)))
    assert choice is not None
    if all(not x.queued_tokens for x in prefill) and all(not x.sequences for x in decode):
        assert choice.now
