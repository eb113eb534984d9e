import random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.engine.step_cost import StepCost, StepFit

TRUE = StepCost(base_ms=10.0, ms_per_prompt_token=2.0, ms_per_sequence=0.5)
SIZES = [(0, 1), (0, 8), (0, 30), (16, 2), (64, 8), (256, 0), (200, 12)]


def fitted(cost: StepCost, sizes=SIZES, times: int = 4) -> StepFit:
    fit = StepFit()
    for _ in range(times):
        for prompt_tokens, sequences in sizes:
            ms = cost.predict_ms(prompt_tokens, sequences)
            fit.measured(prompt_tokens, sequences, ms)
    return fit


def off(fit: StepFit, cost: StepCost, sizes=SIZES) -> float:
    """The median relative error of what it predicts."""
    return median(abs(fit.cost.predict_ms(*s) / cost.predict_ms(*s) - 1) for s in sizes)


def test_nothing_is_known_before_anything_was_measured():
    fit = StepFit()
    assert fit.cost == StepCost(0.0, 0.0, 0.0)
    assert fit.prompt_tokens_within(150, 4) == 0


def test_an_empty_step_and_one_of_no_time_say_nothing():
    fit = StepFit()
    fit.measured(0, 0, 5.0)
    fit.measured(3, 1, 0.0)
    assert fit.cost == StepCost()


def test_a_linear_cost_is_found():
    cost = fitted(TRUE).cost
    assert cost.base_ms == pytest.approx(TRUE.base_ms, rel=1e-3)
    assert cost.ms_per_prompt_token == pytest.approx(TRUE.ms_per_prompt_token, rel=1e-3)
    assert cost.ms_per_sequence == pytest.approx(TRUE.ms_per_sequence, rel=1e-3)


@pytest.mark.parametrize("size", [(256, 0), (0, 1), (0, 30), (16, 4)])
def test_after_one_kind_of_steps_that_kind_is_predicted(size):
    fit = fitted(TRUE, [size], times=3)
    assert fit.cost.predict_ms(*size) == pytest.approx(TRUE.predict_ms(*size), rel=1e-3)


def test_a_kind_of_steps_counts_from_its_third_on():
    fit = StepFit()
    for _ in range(2):
        fit.measured(0, 1, 2000)
        assert fit.cost == StepCost()
    fit.measured(0, 1, 20)
    assert fit.cost.predict_ms(0, 1) == pytest.approx(2000, rel=1e-3)  # the middle one
    fit = fitted(TRUE)
    before = fit.cost
    fit.measured(2, 40, 1e5)
    fit.measured(2, 40, 1e5)
    assert fit.cost == before


@pytest.mark.parametrize("sequences", [1, 2, 8, 30])
def test_steps_with_one_number_of_sequences_say_little_of_more(sequences):
    cost = fitted(StepCost(base_ms=20.0), [(0, sequences)]).cost
    assert cost.predict_ms(0, 20) == pytest.approx(20, rel=0.05)


def test_the_time_of_chunks_of_one_size_is_that_of_their_tokens():
    cost = fitted(TRUE, [(256, 0)]).cost
    assert cost.predict_ms(16, 0) < 0.2 * cost.predict_ms(256, 0)


def test_chunks_of_one_size_and_steps_of_one_sequence_are_told_apart():
    cost = fitted(TRUE, [(256, 0), (0, 1)]).cost
    assert cost.predict_ms(0, 20) == pytest.approx(TRUE.predict_ms(0, 1), rel=0.05)
    assert cost.ms_per_prompt_token == pytest.approx(TRUE.ms_per_prompt_token, rel=0.01)


def test_steps_without_sequences_say_nothing_of_sequences():
    cost = fitted(TRUE, [(256, 0), (64, 0), (100, 0)]).cost
    assert cost.ms_per_sequence == 0
    assert cost.ms_per_prompt_token == pytest.approx(2.0, rel=1e-3)


def test_a_few_steps_that_the_machine_held_up_change_little():
    rng, fit = random.Random(1), StepFit()
    for _ in range(600):
        prompt_tokens, sequences = rng.choice(SIZES)
        ms = TRUE.predict_ms(prompt_tokens, sequences) * rng.uniform(0.95, 1.05)
        held_up = rng.random() < 0.15
        fit.measured(prompt_tokens, sequences, ms * (rng.uniform(3, 50) if held_up else 1))
    assert off(fit, TRUE) < 0.1


def test_a_first_step_that_is_slow_is_soon_outweighed():
    fit = StepFit()
    fit.measured(256, 0, 20 * TRUE.predict_ms(256, 0))
    for _ in range(8):
        fit.measured(256, 0, TRUE.predict_ms(256, 0))
    assert fit.cost.predict_ms(256, 0) == pytest.approx(TRUE.predict_ms(256, 0), rel=1e-3)


def test_it_follows_a_machine_that_becomes_slower():
    fit = fitted(TRUE, times=40)
    slower = StepCost(2 * TRUE.base_ms, 2 * TRUE.ms_per_prompt_token, 2 * TRUE.ms_per_sequence)
    for _ in range(17):
        for size in SIZES:
            fit.measured(*size, slower.predict_ms(*size))
    assert off(fit, slower) < 0.02


def test_what_prompts_cost_is_still_known_after_thousands_of_steps_without_one():
    fit = fitted(TRUE)
    for _ in range(5000):
        fit.measured(0, 4, TRUE.predict_ms(0, 4))
    assert fit.cost.ms_per_prompt_token == pytest.approx(TRUE.ms_per_prompt_token, rel=0.02)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 64), st.floats(1e-3, 1e5)), max_size=40
    ),
    limit_ms=st.floats(0, 1e4),
    sequences=st.integers(0, 64),
)
@settings(max_examples=150, deadline=None)
def test_no_cost_is_ever_negative_and_no_limit_is_passed(steps, limit_ms, sequences):
    fit, most = StepFit(), 0
    for step in steps:
        fit.measured(*step)
        most = max(most, step[0])
    cost = fit.cost
    assert min(cost.base_ms, cost.ms_per_prompt_token, cost.ms_per_sequence) >= 0
    within = fit.prompt_tokens_within(limit_ms, sequences)
    assert 0 <= within <= 2 * most
    if within:
        assert cost.predict_ms(within, sequences) <= limit_ms * (1 + 1e-9)


def test_as_many_prompt_tokens_as_the_time_allows():
    fit = fitted(TRUE)
    assert fit.prompt_tokens_within(150, 8) == pytest.approx((150 - 14) / 2, abs=1)
    assert fit.prompt_tokens_within(14, 8) == 0
    assert fit.prompt_tokens_within(5, 8) == 0


def test_less_while_steps_with_prompts_take_longer_than_the_fit_says():
    """As they do far into a long prompt."""
    fit = fitted(TRUE, times=20)
    before = fit.prompt_tokens_within(150, 8)
    for _ in range(3):
        fit.measured(64, 8, 2 * TRUE.predict_ms(64, 8))
    assert fit.cost.ms_per_prompt_token == pytest.approx(2.0, rel=0.05)
    assert fit.prompt_tokens_within(150, 8) == pytest.approx((75 - 14) / 2, abs=2)
    for _ in range(3):
        fit.measured(64, 8, TRUE.predict_ms(64, 8))
    assert fit.prompt_tokens_within(150, 8) == pytest.approx(before, abs=2)


def test_a_machine_that_is_faster_for_a_moment_is_not_counted_on():
    fit = fitted(TRUE, times=20)
    for _ in range(3):
        fit.measured(64, 8, 0.2 * TRUE.predict_ms(64, 8))
    assert fit.prompt_tokens_within(150, 8) <= (150 - 14) / 2 * 1.05


def test_no_more_than_twice_of_what_was_measured():
    fit = fitted(TRUE, [(0, 1), (0, 8), (16, 2)])
    assert fit.prompt_tokens_within(10_000, 2) == 32
