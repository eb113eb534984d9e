"""Which steps are measured, and what they are made of."""

from cluster.capacity.device import attended
from cluster.profiling.steps import (
    StepShape,
    all_steps,
    decode_steps,
    measurable,
    prompt_steps,
)
from kvrelay.kv.layout import KVLayout

LAYOUT = KVLayout("m", "float32", layers=2, block_size=16, kv_heads=1, head_dim=16)


def test_a_step_says_what_its_time_depends_on():
    shape = StepShape(((16, 0), (8, 100)), 3, 40)
    assert shape.work == (24, attended(16, 0) + attended(8, 100), 3, 120)
    assert shape.name == "step/16@0+8@100+b3@40"
    assert StepShape.from_json(shape.to_json()) == shape


def test_all_kinds_of_steps_are_measured_up_to_what_a_worker_takes():
    steps = all_steps(100, 32, quick=False)
    assert max(s.prompt_tokens for s in steps) == 100
    assert max(s.sequences for s in steps) == 32
    assert any(s.prompt_tokens and s.sequences for s in steps)
    assert len(set(steps)) == len(steps)


def test_quick_is_shorter_and_has_all_kinds_too():
    quick = all_steps(256, 64, quick=True)
    assert len(quick) < len(all_steps(256, 64, quick=False)) / 3
    assert any(s.prompt_tokens and s.sequences for s in quick)


def test_the_smallest_chunk_and_batch_have_steps():
    for quick in (True, False):
        assert all(s.prompt_tokens or s.sequences for s in all_steps(1, 1, quick=quick))
    assert prompt_steps(1)
    assert decode_steps(1)


def test_what_there_is_no_room_for_is_left_out():
    small = StepShape((), 2, 15)
    long = StepShape(((16, 496),))
    assert list(measurable([small, long], LAYOUT, 2, None)) == [small]
    assert list(measurable([small, long], LAYOUT, 32, 511)) == [small]
    assert list(measurable([small, long], LAYOUT, 32, 512)) == [small, long]
