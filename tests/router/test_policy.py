import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv.layout import reserved_blocks
from kvrelay.wire.worker_pb2 import StepCost
from router.policy import Choice, Placement, Wish, place
from router.prediction import (
    NEUTRAL,
    DecodeView,
    PrefillView,
    Rates,
    local_ms,
    prefill_ms,
    rates_of,
    tokens_left,
)


def p(name: str = "p1", queued: int = 0, total: int = 1000, **more) -> PrefillView:
    return PrefillView(name, queued, total, block_size=4, **more)


def d(name: str = "d1", free: int = 1000, sequences: int = 0, **more) -> DecodeView:
    return DecodeView(name, free, sequences, block_size=4, **more)


def wish(prompt: int = 8, answer: int = 4, *, backlog: int = 50, **more) -> Wish:
    return Wish(prompt, answer, backlog, **{"local": False, **more})


def chosen(prefill, decode, prompt: int = 8, answer: int = 4, **more) -> tuple | None:
    """The pair if it takes the request now."""
    choice = place(prefill, decode, wish(prompt, answer, **more))
    return choice.placement.pair if choice and choice.now else None


# ---- with prompts computed by prefill workers alone


def test_the_least_busy_pair_is_chosen():
    prefill = [p("p1", queued=20), p("p2", queued=10)]
    decode = [d("d1", sequences=3), d("d2", sequences=2)]
    assert chosen(prefill, decode) == ("p2", "d2")


def test_among_equally_busy_decode_workers_the_one_with_more_room_is_chosen():
    assert chosen([p()], [d("d1", free=50), d("d2", free=60)]) == ("p1", "d2")


def test_ties_are_broken_by_name_whatever_the_order():
    prefill, decode = [p("p2"), p("p1")], [d("d2"), d("d1")]
    assert chosen(prefill, decode) == chosen(prefill[::-1], decode[::-1]) == ("p1", "d1")


def test_without_a_decode_worker_nothing_is_placed():
    assert place([p()], [], wish()) is None


def test_without_prefill_workers_decode_workers_compute_prompts():
    assert chosen([], [d("d1", sequences=1), d("d2")]) == (None, "d2")


@pytest.mark.parametrize(
    ("failures", "pair"),
    [
        ({}, ("p1", "d1")),
        ({"p2": 1}, ("p1", "d1")),
        ({"d1": 1}, ("p1", "d2")),
        ({"p1": 1, "d1": 1}, ("p2", "d2")),
        ({"p1": 1, "p2": 1, "d1": 2, "d2": 1}, ("p1", "d2")),
        ({"p1": 1, "p2": 1, "d1": 1, "d2": 1}, ("p1", "d1")),
    ],
)
def test_workers_that_failed_the_request_are_the_last_resort(failures, pair):
    prefill = [p("p1"), p("p2", queued=1)]
    decode = [d("d1"), d("d2", sequences=3)]
    assert chosen(prefill, decode, failures=failures) == pair


def test_workers_that_failed_others_come_next_to_last():
    prefill = [p("p1", shunned=True), p("p2", queued=1)]
    decode = [d("d1", shunned=True), d("d2", sequences=3)]
    assert chosen(prefill, decode) == ("p2", "d2")
    assert chosen(prefill, decode, failures={"p2": 1, "d2": 1}) == ("p1", "d1")
    assert chosen(prefill[:1], decode[:1]) == ("p1", "d1")


def test_a_decode_worker_alone_is_better_than_a_prefill_worker_that_failed():
    decode = [d("d1", sequences=30)]
    assert chosen([p()], decode, prompt=400, local=True) == ("p1", "d1")
    assert chosen([p()], decode, prompt=400, local=True, failures={"p1": 1}) == (None, "d1")


def test_an_idle_prefill_worker_takes_a_prompt_longer_than_the_backlog():
    assert chosen([p()], [d()], prompt=200) == ("p1", "d1")


@pytest.mark.parametrize(("queued", "cached", "takes"), [(42, 0, True), (43, 0, False), (46, 1, 1)])
def test_a_busy_prefill_worker_takes_prompts_up_to_the_backlog(queued, cached, takes):
    prefill = [p(queued=queued, cached_blocks=cached)]
    assert (chosen(prefill, [d()], prompt=8) is not None) == takes


def test_a_short_prompt_is_not_kept_from_a_worker_that_would_serve_it_next():
    busy = p(queued=4000, queued_prompts=1)
    assert chosen([busy], [d()], prompt=32, backlog=4000) == ("p1", "d1")
    assert chosen([busy], [d()], prompt=2100, backlog=4000) is None
    assert chosen([p(queued=4000)], [d()], prompt=32, backlog=4000) is None, "nobody knows"


def test_so_with_decode_workers_that_compute_prompts():
    busy = d(queued_tokens=4000, queued_prompts=1)
    assert chosen([], [busy], prompt=32, backlog=4000) == (None, "d1")
    assert chosen([], [busy], prompt=2100, backlog=4000) is None


def test_who_has_just_refused_is_left_out():
    assert chosen([p("p1", full=True), p("p2", queued=40)], [d()]) == ("p2", "d1")
    assert chosen([p(full=True)], [d()], prompt=1500, local=True) == (None, "d1")


def test_where_all_have_refused_nobody_has_room():
    assert place([p(full=True)], [d()], wish()) is None
    assert place([p()], [d(full=True)], wish()) is None


def test_a_refusal_is_no_reason_to_make_running_answers_late():
    late = d(sequences=9, rates=Rates(10, 0.01, 1), itl_target_ms=19)
    choice = place([p(full=True)], [late], wish(local=True))
    assert (choice.placement.pair, choice.now) == ((None, "d1"), False)


@pytest.mark.parametrize(("total", "pair"), [(2, ("p1", "d1")), (1, (None, "d1"))])
def test_a_prompt_too_long_for_every_prefill_worker_is_computed_at_the_decode_worker(total, pair):
    assert chosen([p(total=total)], [d()], prompt=8) == pair


@pytest.mark.parametrize(("free", "takes"), [(3, True), (2, False)])
def test_a_decode_worker_must_have_room_for_prompt_and_answer(free, takes):
    assert (chosen([p()], [d(free=free)], prompt=8, answer=5) is not None) == takes


def test_a_worker_with_room_is_preferred_to_a_less_busy_one_without():
    decode = [d("d1", free=2, sequences=0), d("d2", free=9, sequences=7)]
    assert chosen([p()], decode, prompt=8, answer=5) == ("p1", "d2")


@pytest.mark.parametrize(
    ("prompt", "answer", "blocks"), [(4, 1, 1), (4, 2, 2), (5, 4, 2), (5, 5, 3), (4, 0, 1)]
)
def test_the_last_token_of_an_answer_needs_no_room(prompt, answer, blocks):
    assert reserved_blocks(prompt, answer, 4) == blocks


# ---- predictions


def test_rates_that_were_not_measured_are_the_usual_ones():
    assert rates_of(StepCost()) is NEUTRAL
    usual = Rates(7, 8, 9)
    assert rates_of(StepCost(), usual) is usual
    assert rates_of(StepCost(base_ms=1, ms_per_sequence=2), usual) == Rates(1, 8, 2)
    assert rates_of(StepCost(base_ms=1, ms_per_prompt_token=2), usual) == Rates(1, 2, 9)


@pytest.mark.parametrize("wrong", [1e-320, 1e-9, 1e300, float("nan"), float("inf"), -1.0])
def test_figures_that_cannot_be_are_the_usual_ones(wrong):
    usual = Rates(7, 8, 9)
    cost = StepCost(base_ms=1, ms_per_prompt_token=wrong, ms_per_sequence=2)
    assert rates_of(cost, usual) == Rates(1, 8, 2)
    cost = StepCost(base_ms=1, ms_per_prompt_token=2, ms_per_sequence=wrong)
    assert rates_of(cost, usual) == Rates(1, 2, 9)
    cost = StepCost(base_ms=wrong, ms_per_prompt_token=2, ms_per_sequence=3)
    assert rates_of(cost, usual).base_ms in ((wrong, 7) if 0 <= wrong < 1 else (7,))
    worker = d(sequences=3, rates=rates_of(StepCost(ms_per_prompt_token=wrong)), itl_target_ms=50)
    assert place([p(rates=worker.rates)], [worker], wish(local=True)) is not None


@pytest.mark.parametrize(
    ("prompt", "cached", "left"), [(10, 0, 10), (10, 2, 2), (8, 2, 4), (9, 9, 1), (1, 1, 1)]
)
def test_the_last_token_of_a_prompt_is_always_computed(prompt, cached, left):
    assert tokens_left(p(cached_blocks=cached), prompt) == left


def test_a_prompt_waits_for_all_that_the_prefill_worker_has_queued():
    worker = p(queued=300, rates=Rates(10, 0.5, 0))
    assert prefill_ms(worker, 100) == 400 * 0.5 + 2 * 10


@pytest.mark.parametrize(
    ("own", "prompts", "ahead"),
    [(32, 1, 256), (256, 1, 256), (257, 1, 512), (32, 3, 768), (5000, 1, 4000), (32, 0, 4000)],
)
def test_prompts_take_turns_chunk_by_chunk(own, prompts, ahead):
    worker = p(queued=4000, queued_prompts=prompts, rates=Rates(0, 0.5, 0))
    assert prefill_ms(worker, own) == (ahead + own) * 0.5
    worker = d(queued_tokens=4000, queued_prompts=prompts, rates=Rates(0, 0.5, 0))
    assert local_ms(worker, own)[0] == (ahead + own) * 0.5


def test_turns_and_steps_are_as_long_as_the_worker_says():
    worker = p(queued=4000, queued_prompts=1, chunk_tokens=64, rates=Rates(10, 0.5, 0))
    assert prefill_ms(worker, 32) == 96 * 0.5 + 2 * 10
    worker = d(queued_tokens=4000, queued_prompts=1, chunk_tokens=64, rates=Rates(10, 0.5, 0))
    assert local_ms(worker, 32)[0] == 96 * 0.5 + 2 * 10


def test_turns_are_as_long_as_the_target_allows():
    worker = d(
        queued_tokens=900,
        queued_prompts=1,
        sequences=10,
        rates=Rates(10, 0.5, 1),
        itl_target_ms=40,  # leaves 20 ms, for 40 tokens
    )
    assert local_ms(worker, 100)[0] == 6 * 20 + 220 * 0.5


def test_a_faster_prefill_worker_is_worth_a_longer_queue():
    slow, fast = p("p1", 10, rates=Rates(5, 1, 0)), p("p2", 40, rates=Rates(5, 0.1, 0))
    assert chosen([slow, fast], [d()], backlog=500) == ("p2", "d1")


def test_a_cached_prefix_is_worth_a_longer_queue_as_long_as_it_saves_more():
    def pair(queued: int) -> tuple | None:
        cached = p("p2", queued, cached_blocks=90)
        return chosen([p("p1"), cached], [d()], prompt=400, backlog=1000)

    assert pair(300) == ("p2", "d1")
    assert pair(390) == ("p1", "d1")


def test_blocks_that_the_decode_worker_caches_are_not_handed_over():
    prefill = [p(block_ms=1.0)]
    decode = [d("d1"), d("d2", cached_blocks=10)]
    assert chosen(prefill, decode, prompt=40) == ("p1", "d2")
    one, other = (place(prefill, [x], wish(40)) for x in decode)
    assert one.placement.predicted_ttft_ms - other.placement.predicted_ttft_ms == 10


def test_waiting_for_the_best_worker_may_be_better_than_any_that_takes_it_now():
    busy = p("p2", queued=50, cached_blocks=99)
    choice = place([p("p1"), busy], [d()], wish(400, backlog=50))
    assert choice == Choice(Placement("p2", "d1", *choice.placement[2:4], 4), now=False)


def test_tpot_is_that_of_the_batch_with_this_answer_in_it():
    choice = place([p()], [d(sequences=3, rates=Rates(10, 1, 2))], wish())
    assert choice.placement.predicted_tpot_ms == 18


def test_a_decode_worker_that_would_miss_its_target_is_taken_only_when_all_would():
    slow = d("d1", sequences=1, rates=Rates(19, 0.1, 1), itl_target_ms=20)
    keeps = d("d2", sequences=1, rates=Rates(40, 4, 4), itl_target_ms=60)
    assert chosen([p()], [slow, keeps]) == ("p1", "d2")
    assert chosen([p()], [slow]) == ("p1", "d1")


# ---- prompts computed at the decode worker


def test_chunks_are_what_the_target_leaves_of_a_step():
    worker = d(sequences=10, rates=Rates(10, 0.5, 1), itl_target_ms=40)  # 20 ms for 40 tokens
    ttft_ms, harm_ms, harmless = local_ms(worker, 100)
    assert (ttft_ms, harm_ms, harmless) == (3 * 20 + 100 * 0.5, 11 * 50, True)


@pytest.mark.parametrize(("sequences", "harmless"), [(0, True), (7, True), (8, False)])
def test_a_step_without_room_for_a_block_computes_no_prompt_unless_idle(sequences, harmless):
    worker = d(sequences=sequences, rates=Rates(10, 1, 2), itl_target_ms=28)
    assert local_ms(worker, 10)[2] == harmless


def test_a_prompt_cached_but_for_its_last_block_is_computed_at_the_decode_worker():
    decode = [d("d1"), d("d2", sequences=2, cached_blocks=374)]
    assert chosen([p()], decode, prompt=1500, backlog=5000, local=True) == (None, "d2")


def test_a_long_prompt_goes_to_a_prefill_worker_even_if_the_decode_worker_is_idle():
    assert chosen([p()], [d()], prompt=1500, backlog=5000, local=True) == ("p1", "d1")


def test_a_few_tokens_are_not_worth_a_hand_off():
    assert chosen([p()], [d()], prompt=4, local=True) == (None, "d1")
    assert chosen([p()], [d()], prompt=4, local=False) == ("p1", "d1")


def test_what_running_answers_lose_counts_against_computing_beside_them():
    def pair(sequences: int) -> tuple | None:
        return chosen([p(queued=100)], [d(sequences=sequences)], 40, backlog=500, local=True)

    assert pair(1) == (None, "d1")
    assert pair(20) == ("p1", "d1")


def test_no_prompt_is_computed_beside_answers_that_it_would_make_late():
    late = d(sequences=9, rates=Rates(10, 0.01, 1), itl_target_ms=19)
    assert chosen([p(queued=40)], [late], prompt=8, local=True) == ("p1", "d1")
    assert chosen([], [late], prompt=8) == (None, "d1")


def test_a_decode_worker_with_prompts_enough_is_waited_for():
    assert place([], [d(queued_tokens=43)], wish(8)).now is False
    assert place([], [d(queued_tokens=42)], wish(8)).now is True


@given(
    prefill=st.lists(st.builds(p, st.sampled_from("abc"), st.integers(0, 60)), max_size=4),
    decode=st.lists(
        st.builds(
            d,
            st.sampled_from("xyz"),
            st.integers(0, 9),
            st.integers(0, 5),
            cached_blocks=st.integers(0, 4),
            itl_target_ms=st.sampled_from((0, 6, 50)),
            full=st.booleans(),
        ),
        max_size=4,
    ),
    prompt=st.integers(1, 40),
    answer=st.integers(1, 40),
    local=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_whoever_is_chosen_can_take_it_and_none_means_nobody_has_room(
    prefill, decode, prompt, answer, local
):
    fit_d = [
        x for x in decode if not x.full and x.blocks_free >= reserved_blocks(prompt, answer, 4)
    ]
    choice = place(prefill, decode, wish(prompt, answer, local=local))
    assert (choice is None) == (not fit_d)
    if choice is not None:
        assert choice.placement.decode in {x.worker_id for x in fit_d}
        assert 1 <= choice.placement.tokens <= prompt
        assert choice.placement.predicted_ttft_ms > 0
        if choice.now and choice.placement.prefill:
            same = [x for x in prefill if x.worker_id == choice.placement.prefill]
            assert any(not x.queued_tokens or x.queued_tokens + prompt <= 50 for x in same)
        if choice.placement.prefill is None:
            assert local or not prefill
