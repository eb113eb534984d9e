"""What a served cluster adds: measured on a whole one, and worked out from times that are known."""

import pytest
from local_cluster import local_cluster
from tiny_models import make_endless

from cluster.capacity.device import StepTime
from cluster.preparation import silent
from cluster.profiling.served import BothBusy, Gaps, ServedAsk, ServedTimes, measure_served

STEP = StepTime(base_ms=5.0, ms_per_prompt_token=0.5, ms_per_sequence=1.0)


def test_a_hand_off_is_fixed_and_by_block():
    times = ServedTimes("tcp", exposed_ms={16: [2.0, 2.5, 90.0], 256: [7.0, 10.0, 10.0]})
    found = times.hand_off(16)
    assert found.link == "tcp"
    assert found.ms_per_block == pytest.approx(0.5)
    assert found.ms(16) == pytest.approx(10.0)


def test_a_hand_off_of_more_blocks_never_takes_less():
    found = ServedTimes("shm", exposed_ms={16: [3.0], 256: [2.0]}).hand_off(16)
    assert (found.fixed_ms, found.ms_per_block) == (3.0, 0.0)
    assert ServedTimes("shm", exposed_ms={16: [3.0]}).hand_off(16).fixed_ms == 3.0


def test_what_passes_between_steps_becomes_part_of_each():
    gaps = [Gaps(n, 64, STEP.ms(0, 0, n, 0) + 0.5 + 0.25 * n) for n in (1, 4, 8)]
    found = ServedTimes("shm", gaps=gaps).with_turns(STEP)
    assert found.base_ms == pytest.approx(5.5)
    assert found.ms_per_sequence == pytest.approx(1.25)
    assert found.ms_per_prompt_token == STEP.ms_per_prompt_token


def test_gaps_shorter_than_the_steps_take_nothing_away():
    gaps = [Gaps(n, 64, STEP.ms(0, 0, n, 0) * 0.9) for n in (1, 4)]
    assert ServedTimes("shm", gaps=gaps).with_turns(STEP) == STEP
    assert ServedTimes("shm").with_turns(STEP) == STEP


def test_the_router_takes_what_the_step_does_not():
    times = ServedTimes("shm", first_token_ms={16: [15.0, 16.0, 99.0], 64: [40.0, 41.0, 42.0]})
    assert times.router_ms(STEP) == pytest.approx(3.5)
    assert times.router_ms(StepTime(base_ms=1000.0)) == 0.0


def test_beside_a_busy_neighbour_each_takes_as_much_longer_as_measured():
    times = ServedTimes("shm", both=BothBusy(7.5, 120.0, 100.0, 9.0, 10.0))
    found = times.neighbour()
    assert found is not None
    assert (found.prefill, found.decode) == (pytest.approx(1.2), 1.0)
    assert ServedTimes("shm").neighbour() is None


def test_the_router_is_as_often_busy_as_idle():
    times = ServedTimes("shm", first_token_ms={16: [15.5]}, both=BothBusy(7.5, 1.0, 1.0, 1.0, 1.0))
    assert times.router_ms(STEP) == pytest.approx((2.5 + 7.5) / 2)


async def test_a_whole_cluster_is_measured(tmp_path):
    ask = ServedAsk((16, 64), rounds=2, streams=(1, 3), answer_tokens=8)
    async with local_cluster(make_endless(tmp_path)) as cluster:
        times = await measure_served(cluster.router.address, "shm", ask, silent)
    assert times.link == "shm"
    assert {tokens: len(taken) for tokens, taken in times.exposed_ms.items()} == {16: 2, 64: 2}
    assert all(ms > 0 for taken in times.first_token_ms.values() for ms in taken)
    assert [gap.streams for gap in times.gaps] == [1, 3]
    assert all(gap.gap_ms > 0 and 32 <= gap.context <= 40 for gap in times.gaps)
    assert times.both is not None
    assert min(times.both.prefill_ms, times.both.gap_ms, times.both.gap_alone_ms) > 0


def test_what_is_asked_has_a_short_and_a_full_chunk():
    assert ServedAsk.of(16, 256, quick=False).prompts == (16, 256)
    assert ServedAsk.of(16, 16, quick=True).prompts == (16,)
