import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv.layout import reserved_blocks
from router.policy import DecodeView, Placement, PrefillView, place


def p(name: str = "p1", queued: int = 0, total: int = 100) -> PrefillView:
    return PrefillView(name, queued, total, block_size=4)


def d(name: str = "d1", free: int = 100, sequences: int = 0) -> DecodeView:
    return DecodeView(name, free, 100, sequences, block_size=4)


def placed(prefill, decode, prompt: int = 8, answer: int = 4) -> Placement | None:
    return place(prefill, decode, prompt_tokens=prompt, max_tokens=answer, backlog_tokens_max=50)


def test_the_least_busy_pair_is_chosen():
    prefill = [p("p1", queued=20), p("p2", queued=10)]
    decode = [d("d1", sequences=3), d("d2", sequences=2)]
    assert placed(prefill, decode) == Placement("p2", "d2")


def test_among_equally_busy_decode_workers_the_one_with_more_room_is_chosen():
    assert placed([p()], [d("d1", free=50), d("d2", free=60)]) == Placement("p1", "d2")


def test_ties_are_broken_by_name_whatever_the_order():
    prefill, decode = [p("p2"), p("p1")], [d("d2"), d("d1")]
    assert placed(prefill, decode) == placed(prefill[::-1], decode[::-1]) == Placement("p1", "d1")


def test_without_workers_of_either_role_nothing_is_placed():
    assert placed([], [d()]) is None
    assert placed([p()], []) is None


@pytest.mark.parametrize(
    ("avoid", "chosen"),
    [
        ({("p2", "d1")}, ("p1", "d1")),
        ({("p1", "d1")}, ("p1", "d2")),
        ({("p1", "d1"), ("p1", "d2")}, ("p2", "d1")),
        ({("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")}, ("p1", "d1")),
    ],
)
def test_a_pair_to_avoid_is_the_last_resort(avoid, chosen):
    placement = place(
        [p("p1"), p("p2")],
        [d("d1"), d("d2")],
        prompt_tokens=8,
        max_tokens=4,
        backlog_tokens_max=50,
        avoid=frozenset(avoid),
    )
    assert placement == Placement(*chosen)


def test_an_idle_prefill_worker_takes_a_prompt_longer_than_the_backlog():
    assert placed([p()], [d()], prompt=200) == Placement("p1", "d1")


@pytest.mark.parametrize(("queued", "takes"), [(42, True), (43, False)])
def test_a_busy_prefill_worker_takes_prompts_up_to_the_backlog(queued, takes):
    assert (placed([p(queued=queued)], [d()], prompt=8) is not None) == takes


@pytest.mark.parametrize(("total", "takes"), [(2, True), (1, False)])
def test_a_prompt_goes_only_where_it_fits_the_whole_prefill_pool(total, takes):
    assert (placed([p(total=total)], [d()], prompt=8) is not None) == takes


@pytest.mark.parametrize(("free", "takes"), [(3, True), (2, False)])
def test_a_decode_worker_must_have_room_for_prompt_and_answer(free, takes):
    assert (placed([p()], [d(free=free)], prompt=8, answer=5) is not None) == takes


def test_a_worker_with_room_is_preferred_to_a_less_busy_one_without():
    decode = [d("d1", free=2, sequences=0), d("d2", free=9, sequences=7)]
    assert placed([p()], decode, prompt=8, answer=5) == Placement("p1", "d2")


@pytest.mark.parametrize(
    ("prompt", "answer", "blocks"), [(4, 1, 1), (4, 2, 2), (5, 4, 2), (5, 5, 3), (4, 0, 1)]
)
def test_the_last_token_of_an_answer_needs_no_room(prompt, answer, blocks):
    assert reserved_blocks(prompt, answer, 4) == blocks


@given(
    prefill=st.lists(st.builds(p, st.sampled_from("abc"), st.integers(0, 60)), max_size=4),
    decode=st.lists(
        st.builds(d, st.sampled_from("xyz"), st.integers(0, 9), st.integers(0, 5)), max_size=4
    ),
    prompt=st.integers(1, 40),
    answer=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_whoever_is_chosen_can_take_it_and_none_means_nobody_can(prefill, decode, prompt, answer):
    fit_p = [x for x in prefill if not x.queued_tokens or x.queued_tokens + prompt <= 50]
    fit_d = [x for x in decode if x.blocks_free >= reserved_blocks(prompt, answer, 4)]
    chosen = placed(prefill, decode, prompt, answer)
    if chosen is None:
        assert not fit_p or not fit_d
    else:
        assert chosen.prefill in {x.worker_id for x in fit_p}
        assert chosen.decode in {x.worker_id for x in fit_d}
