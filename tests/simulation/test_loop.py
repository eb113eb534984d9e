"""Virtual time: order, jumps, and processes that are stopped and killed."""

import asyncio
from random import Random

import pytest

from cluster.simulation.loop import START_S, Life, LivelockError, ProcessLoop, Timeline


def played(timeline: Timeline) -> None:
    while timeline.step():
        pass


def test_time_jumps_from_one_timer_to_the_next():
    timeline = Timeline()
    loop = ProcessLoop(timeline, offset_s=500.0)
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, s: float) -> None:
        for _ in range(2):
            await asyncio.sleep(s)
            seen.append((name, asyncio.get_running_loop().time()))

    loop.spawn(sleeper("hour", 3600.0))
    loop.spawn(sleeper("minute", 60.0))
    played(timeline)
    begun = START_S + 500.0
    assert seen == [
        ("minute", begun + 60),
        ("minute", begun + 120),
        ("hour", begun + 3600),
        ("hour", begun + 7200),
    ]
    assert timeline.now_s == START_S + 7200


def order_of_one_time(shuffle: Random | None) -> list[int]:
    timeline, seen = Timeline(shuffle), []
    loop = ProcessLoop(timeline)
    for number in range(20):
        loop.post(START_S + 1, seen.append, number)
    played(timeline)
    return seen


def test_what_happens_at_one_time_happens_in_order_of_insertion_or_as_the_seed_says():
    assert order_of_one_time(None) == list(range(20))
    assert order_of_one_time(Random(7)) == order_of_one_time(Random(7)) != list(range(20))
    assert sorted(order_of_one_time(Random(8))) == list(range(20))


def test_timeouts_and_cancelled_timers_work_as_on_asyncios_loop():
    timeline = Timeline()
    loop = ProcessLoop(timeline)

    async def patient() -> str:
        async with asyncio.timeout(10):
            await asyncio.sleep(1)
        try:
            async with asyncio.timeout(2):
                await asyncio.Event().wait()
        except TimeoutError:
            return "late"
        return "never"

    task = loop.spawn(patient())
    played(timeline)
    assert task.result() == "late"
    assert timeline.now_s == START_S + 3, "a timer that was cancelled holds nobody up"


def test_a_stopped_process_does_nothing_and_finds_all_of_it_when_it_goes_on():
    timeline, seen = Timeline(), []
    loop = ProcessLoop(timeline)

    async def beat() -> None:
        while len(seen) < 4:
            seen.append(timeline.now_s - START_S)
            await asyncio.sleep(1)

    loop.spawn(beat())
    timeline.call_later(0.5, loop.stop_running)
    timeline.call_later(5.5, loop.go_on)
    played(timeline)
    assert seen == [0, 5.5, 6.5, 7.5]


def test_a_killed_process_stops_between_two_callbacks_and_unwinds_unseen():
    timeline = Timeline()
    errors: list[str] = []
    loop = ProcessLoop(timeline, failed=errors.append)
    seen: list[str] = []

    async def lives() -> None:
        try:
            await asyncio.sleep(1)
            seen.append("one")
            loop.die()
            await asyncio.sleep(0)
            seen.append("after its death")
        finally:
            await asyncio.sleep(1)  # nobody waits for it

    loop.spawn(lives())
    played(timeline)
    loop.unwind()
    assert loop.life is Life.DEAD
    assert seen == ["one"]
    assert errors == []


def test_an_error_that_no_task_catches_is_told():
    timeline = Timeline()
    errors: list[str] = []
    loop = ProcessLoop(timeline, failed=errors.append)

    def breaks() -> None:
        raise RuntimeError("broken")

    loop.post(START_S, breaks)
    played(timeline)
    assert "broken" in errors[0]


def test_a_process_that_goes_round_without_time_is_found():
    timeline = Timeline()
    loop = ProcessLoop(timeline)

    async def spins() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    loop.spawn(spins())
    with pytest.raises(LivelockError):
        played(timeline)
    loop.die()
    loop.unwind()


def test_what_a_thread_would_do_is_done_at_once():
    timeline = Timeline()
    loop = ProcessLoop(timeline)
    task = loop.spawn(asyncio.to_thread(lambda: 5))
    played(timeline)
    assert task.result() == 5
