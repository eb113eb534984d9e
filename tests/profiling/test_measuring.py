"""How steps are timed, with engines whose steps take what they are told."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import pytest

from cluster.capacity.device import BusyNeighbour
from cluster.preparation import silent
from cluster.profiling.engines import Engine, Engines
from cluster.profiling.measuring import Effort, neighbour_slows, step_times
from cluster.profiling.steps import StepShape, decode_steps, prompt_steps

EFFORT = Effort(rounds=3, turn_s=0.0)
PROMPTS, DECODES = prompt_steps(64), decode_steps(64)


class PacedEngine:
    """Slower by `factor` while its neighbour is busy."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.neighbour: PacedEngine | None = None
        self.busy_with: StepShape | None = None
        self.asked: list[StepShape] = []

    def times_ms(self, shape: StepShape, turn_s: float) -> list[float]:
        self.asked.append(shape)
        held_up = self.neighbour is not None and self.neighbour.busy_with is not None
        ms = (shape.prompt_tokens + shape.sequences) * (self.factor if held_up else 1.0)
        return [ms, ms, ms * 100]

    @contextlib.contextmanager
    def busy(self, shape: StepShape) -> Iterator[None]:
        self.busy_with = shape
        yield
        self.busy_with = None


def engines(prefill: PacedEngine, decode: PacedEngine | None) -> Engines:
    both = (cast(Engine, prefill), cast(Any, decode))
    return Engines(*both, info=cast(Any, None), cores=((0,), (1,)))


def pair(prefill: float, decode: float) -> tuple[PacedEngine, PacedEngine]:
    one, other = PacedEngine(prefill), PacedEngine(decode)
    one.neighbour, other.neighbour = other, one
    return one, other


def test_steps_take_turns_and_the_middle_of_their_times_counts():
    engine = PacedEngine()
    shapes = [*PROMPTS, *DECODES]
    times = step_times(cast(Engine, engine), shapes, EFFORT, silent)
    assert times == [shape.prompt_tokens + shape.sequences for shape in shapes]
    assert engine.asked == shapes * EFFORT.rounds


def test_each_phase_is_slowed_by_the_other():
    prefill, decode = pair(1.1, 1.4)
    found = neighbour_slows(engines(prefill, decode), PROMPTS, DECODES, EFFORT, silent)
    assert found.prefill == pytest.approx(1.1)
    assert found.decode == pytest.approx(1.4)
    assert {shape.sequences for shape in prefill.asked} == {0}
    assert {shape.prompt_tokens for shape in decode.asked} == {0}


def test_a_neighbour_never_makes_faster():
    both = engines(*pair(0.9, 0.5))
    assert neighbour_slows(both, PROMPTS, DECODES, EFFORT, silent) == BusyNeighbour()


def test_where_nothing_can_be_beside_nothing_is_slower():
    one, other = pair(2.0, 2.0)
    assert neighbour_slows(engines(one, None), PROMPTS, DECODES, EFFORT, silent).prefill == 1.0
    assert neighbour_slows(engines(one, other), [], DECODES, EFFORT, silent).decode == 1.0
    assert not one.asked
