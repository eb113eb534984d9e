"""The fit finds the step time that the measured steps were made of."""

import random

import numpy as np
import pytest

from cluster.capacity.device import StepTime
from cluster.profiling.fit import fit_steps, least_squares
from cluster.profiling.steps import StepShape, all_steps

TRUTH = StepTime(
    base_ms=6.0,
    ms_per_attended=0.0003,
    ms_per_sequence=0.2,
    ms_per_context_token=0.002,
    ms_by_tokens=((1, 0.0), (8, 3.0), (64, 38.0), (256, 170.0)),
)
LINEAR = StepTime(base_ms=5.0, ms_per_prompt_token=0.6, ms_per_sequence=0.7)
STEPS = all_steps(256, 64, quick=False)
# Of sizes that were not measured.
OTHERS = [
    StepShape(((100, 0), (37, 512))),
    StepShape((), 5, 300),
    StepShape(((48, 64),), 12, 100),
]


def measured(truth: StepTime, noise: float) -> list[tuple[StepShape, float]]:
    dice = random.Random(1)
    return [(s, truth.ms(*s.work) * dice.uniform(1 - noise, 1 + noise)) for s in STEPS]


@pytest.mark.parametrize("truth", [TRUTH, LINEAR])
@pytest.mark.parametrize(("noise", "off"), [(0.0, 0.02), (0.05, 0.06)])
def test_steps_that_were_not_measured_are_predicted(truth: StepTime, noise: float, off: float):
    fit = fit_steps(measured(truth, noise))
    assert fit.median_error <= noise + 0.01
    assert fit.p90_error <= noise + 0.02
    for shape in OTHERS:
        assert fit.step.ms(*shape.work) == pytest.approx(truth.ms(*shape.work), rel=off)


def test_coefficients_come_back_from_steps_without_noise():
    found = fit_steps(measured(TRUTH, 0.0)).step
    assert found.ms_per_attended == pytest.approx(TRUTH.ms_per_attended, rel=0.02)
    assert found.ms_per_context_token == pytest.approx(TRUTH.ms_per_context_token, rel=0.02)


def test_steps_that_were_held_up_change_little():
    steps = measured(LINEAR, 0.02)
    held_up = [(s, ms * 4 if i % 12 == 0 else ms) for i, (s, ms) in enumerate(steps)]
    found = fit_steps(held_up).step
    for shape in OTHERS:
        assert found.ms(*shape.work) == pytest.approx(LINEAR.ms(*shape.work), rel=0.05)


def test_two_steps_are_enough():
    one, two = StepShape((), 1, 16), StepShape(((16, 0),))
    fit = fit_steps([(one, 2.0), (two, 4.0)])
    assert fit.step.ms(*one.work) == pytest.approx(2.0, rel=0.01)
    assert fit.step.ms(*two.work) == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_above_0_is_nearer(seed: int):
    dice = np.random.default_rng(seed)
    a, b = dice.normal(size=(12, 5)), dice.normal(size=12)
    x = least_squares(a, b)
    assert (x >= 0).all()
    slope = a.T @ (a @ x - b)  # of half the square of the distance
    assert (slope >= -1e-8).all()
    assert np.abs(slope * x).max() <= 1e-8


def test_columns_of_zeros_and_equal_ones_do_no_harm():
    a = np.array([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]])
    assert a @ least_squares(a, np.array([3.0, 6.0])) == pytest.approx([3.0, 6.0])
