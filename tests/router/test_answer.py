"""What a reader is given of an answer, however its reading and the workers' steps fall together."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from router.answer import _READERS_A_PASS, Answer, ReadingTurns
from router.commands import Trouble, UnavailableTrouble
from router.request import Ending

DEADLINE_S = 10.0  # only a broken test waits this long


async def read_all(answer: Answer, pauses: Sequence[int] = ()) -> list[list[int]]:
    """What each call of `next` gave, up to the ending. pauses: passes of the loop after each."""
    events = []
    while isinstance(event := await answer.next(), list):
        events.append(event)
        for _ in range(pauses[len(events) % len(pauses)] if pauses else 0):
            await asyncio.sleep(0)
    return events


async def test_a_reader_that_waits_gets_each_token_as_it_comes():
    answer = Answer(ReadingTurns())
    async with asyncio.timeout(DEADLINE_S):
        for token in range(3 * _READERS_A_PASS):
            waits = asyncio.create_task(answer.next())
            await asyncio.sleep(0)
            answer.put([token])
            assert await waits == [token]


async def test_a_reader_that_is_behind_gets_all_that_has_come_and_then_the_ending():
    answer = Answer(ReadingTurns())
    for token in range(100):
        answer.put([token])
    answer.put(Ending.LENGTH)
    assert await answer.next() == list(range(100))
    assert await answer.next() is Ending.LENGTH


async def test_what_came_before_a_trouble_is_delivered_before_it():
    answer = Answer(ReadingTurns())
    answer.put([1, 2])
    answer.put(UnavailableTrouble("gone"))
    assert await answer.next() == [1, 2]
    with pytest.raises(Trouble, match="gone"):
        await answer.next()


async def test_a_reader_that_waits_hears_of_the_ending():
    answer = Answer(ReadingTurns())
    async with asyncio.timeout(DEADLINE_S):
        waits = asyncio.create_task(answer.next())
        await asyncio.sleep(0)
        answer.put(Ending.EOS)
        assert await waits is Ending.EOS


async def test_a_cancelled_reader_takes_nothing_with_it():
    answer = Answer(ReadingTurns())
    async with asyncio.timeout(DEADLINE_S):
        waits = asyncio.create_task(answer.next())
        await asyncio.sleep(0)
        waits.cancel()
        answer.put([1])
        with pytest.raises(asyncio.CancelledError):
            await waits
        answer.put([2])
        assert await answer.next() == [1, 2]


@pytest.mark.parametrize("seed", range(20))
async def test_tokens_come_in_order_and_once_in_any_interleaving(seed):
    draw = random.Random(seed)
    turns = ReadingTurns()
    lengths = [draw.randrange(0, 60) for _ in range(5 * _READERS_A_PASS)]
    answers = [Answer(turns) for _ in lengths]
    pauses = [draw.choice([0, 0, 1, 5, 20]) for _ in range(7)]
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as readers:
        reads = [readers.create_task(read_all(answer, pauses)) for answer in answers]
        left = dict.fromkeys(range(len(lengths)), 0)
        while left:
            for i in draw.sample(sorted(left), min(len(left), 7)):
                count = draw.randrange(1, 4)
                tokens = list(range(left[i], min(lengths[i], left[i] + count)))
                if tokens:
                    answers[i].put(tokens)
                left[i] += len(tokens)
                if left[i] >= lengths[i]:
                    answers[i].put(Ending.LENGTH)
                    del left[i]
            if draw.random() < 0.5:
                await asyncio.sleep(0)
    for read, length in zip(reads, lengths, strict=True):
        assert [token for event in read.result() for token in event] == list(range(length))
        assert all(read.result()), "an event without tokens"


async def test_few_readers_go_in_one_pass_and_none_is_passed_over():
    turns, order = ReadingTurns(), []
    answers = [Answer(turns) for _ in range(5 * _READERS_A_PASS)]

    async def read(index: int) -> None:
        await answers[index].next()
        order.append(index)

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as readers:
        for index in range(len(answers)):
            readers.create_task(read(index))
        await asyncio.sleep(0)
        for answer in answers:
            answer.put([1])
        before = 0
        while len(order) < len(answers):
            await asyncio.sleep(0)
            assert len(order) - before <= _READERS_A_PASS
            before = len(order)
    assert order == list(range(len(answers)))


async def test_a_step_that_comes_while_others_write_goes_into_the_next_message():
    """The step of a worker that is read between turns is not a message of its own for each."""
    turns = ReadingTurns()
    answers = [Answer(turns) for _ in range(3 * _READERS_A_PASS)]
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as readers:
        reads = [readers.create_task(read_all(answer)) for answer in answers]
        await asyncio.sleep(0)
        for token in range(2):
            for answer in answers:
                answer.put([token])
        for answer in answers:
            answer.put(Ending.LENGTH)
    assert reads[-1].result() == [[0, 1]]
    for read in reads:
        assert [token for event in read.result() for token in event] == [0, 1]


async def test_readers_that_have_gone_do_not_use_up_turns():
    turns = ReadingTurns()
    gone = [Answer(turns) for _ in range(4 * _READERS_A_PASS)]
    last = Answer(turns)
    async with asyncio.timeout(DEADLINE_S):
        tasks = [asyncio.create_task(answer.next()) for answer in [*gone, last]]
        await asyncio.sleep(0)
        for answer in [*gone, last]:
            answer.put([1])
        for task in tasks[_READERS_A_PASS:-1]:
            task.cancel()
        assert await tasks[-1] == [1]
        assert not turns._waiting
        await asyncio.gather(*tasks, return_exceptions=True)
