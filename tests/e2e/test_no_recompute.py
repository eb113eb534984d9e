"""Who computes what, and when: the decode worker no prompt token, the prefill worker in chunks,
and both for several requests at once. Looks at every step of the engines of a whole cluster."""

import asyncio
import random

import pytest
from local_cluster import local_cluster
from tiny_models import EOS_ID, make_tiny

from kvrelay.engine.step import Slice

BLOCK_SIZE = 16
CHUNK_TOKENS = 32
WAIT_S = 30


class Steps:
    """Notes the slices of every step of a worker's engine; `before` may hold a step up."""

    def __init__(self, worker) -> None:
        self.all: list[list[Slice]] = []
        self.before = _at_once
        self._step = worker._engine.step
        worker._engine.step = self._noted

    async def _noted(self, slices, *how):
        self.all.append(list(slices))
        await self.before(len(self.all), slices)
        return await self._step(slices, *how)

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens) for step in self.all for s in step)


async def _at_once(number, slices) -> None:
    """Holds nothing up."""


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(WAIT_S):
        await event.wait()


def prompt_of(length: int) -> list[int]:
    # No EOS in it is needed, but a prompt of its own for every length is.
    return random.Random(length).choices(range(EOS_ID + 1, 256), k=length)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def cluster_of(model, **more):
    worker = {"block_size": BLOCK_SIZE, "chunk_tokens": CHUNK_TOKENS, "kv_bytes": 16 << 20}
    return local_cluster(model, worker={**worker, **more})


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_decode_computes_no_prompt_token_and_no_token_twice(model, transport):
    lengths = (1, 15, 16, 17, 32, 33, 100, 250)
    async with cluster_of(model, transport=transport) as cluster, cluster.client() as client:
        prefill, decode = Steps(cluster.prefill[0]), Steps(cluster.decode[0])
        answers = await asyncio.gather(
            *(client.generate(prompt_of(n), max_tokens=1 + n % 20).result() for n in lengths)
        )

    assert all(len(s.tokens) == 1 for step in decode.all for s in step)
    # The prefill worker makes an answer's first token, and the last one is never read back.
    assert decode.tokens == sum(answer.completion_tokens - 1 for answer in answers)
    assert prefill.tokens == sum(lengths)
    assert sorted(_first_positions(decode.all)) == sorted(
        answer.prompt_tokens for answer in answers if answer.completion_tokens > 1
    )


def _first_positions(steps: list[list[Slice]]) -> list[int]:
    """Of each sequence, whose list of blocks is its own, the first position computed."""
    first: dict[int, int] = {}
    for s in (s for step in steps for s in step):
        first.setdefault(id(s.blocks), s.start)
    return list(first.values())


async def test_an_answer_of_one_token_takes_no_decode_step(model):
    async with cluster_of(model) as cluster, cluster.client() as client:
        decode = Steps(cluster.decode[0])
        answer = await client.generate(prompt_of(40), max_tokens=1).result()
    assert (answer.completion_tokens, decode.all) == (1, [])


async def test_prefill_never_computes_more_than_a_chunk_at_once(model):
    lengths = (1, 31, 32, 33, 64, 100, 300, 5)
    async with cluster_of(model) as cluster, cluster.client() as client:
        prefill = Steps(cluster.prefill[0])
        await asyncio.gather(
            *(client.generate(prompt_of(n), max_tokens=3).result() for n in lengths)
        )

    assert max(sum(len(s.tokens) for s in step) for step in prefill.all) == CHUNK_TOKENS
    assert sorted(_covered(prefill.all)) == sorted(lengths)


def _covered(steps: list[list[Slice]]) -> list[int]:
    """Lengths of the prompts computed, each from its start to its end with no gap or overlap."""
    done: dict[int, int] = {}  # by the identity of its blocks, which a job keeps to its end
    for s in (s for step in steps for s in step):
        assert s.start == done.get(id(s.blocks), 0)
        done[id(s.blocks)] = s.end
    return list(done.values())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_blocks_arrive_while_the_prompt_is_still_computed(model, transport):
    prompt = prompt_of(5 * CHUNK_TOKENS)
    before_last = len(prompt) // BLOCK_SIZE - CHUNK_TOKENS // BLOCK_SIZE
    async with cluster_of(model, transport=transport) as cluster, cluster.client() as client:
        prefill = Steps(cluster.prefill[0])
        handoff = cluster.decode[0]._handoff
        received, arrived = handoff.received, asyncio.Event()
        counts = []

        def noted(transfer_id, first_index, count, bad, now_ms):
            received(transfer_id, first_index, count, bad, now_ms)
            counts.append(count)
            if sum(counts) >= before_last:
                arrived.set()

        async def last_chunk_waits(number, slices):
            if slices[0].end == len(prompt):
                await soon(arrived)  # would never be set if blocks went only with the last one

        handoff.received = noted
        prefill.before = last_chunk_waits
        answer = await client.generate(prompt, max_tokens=4).result()

    assert len(prefill.all) == 5
    assert sum(counts) == len(prompt) // BLOCK_SIZE
    assert answer.completion_tokens == 4


async def test_requests_join_and_leave_the_running_batch(model):
    """A runs; B joins at A's 5th step and leaves after 3; C at the 12th, and A goes on."""
    join_at = {5: 4, 12: 6}  # step: max_tokens of who joins then
    a_tokens = 30
    async with cluster_of(model) as cluster, cluster.client() as client:
        decode_worker = cluster.decode[0]
        alone = [
            (await client.generate(prompt_of(20 + at), max_tokens=n).result()).token_ids
            for at, n in ((0, a_tokens), *join_at.items())
        ]
        assert [len(tokens) for tokens in alone] == [a_tokens, *join_at.values()]

        steps = Steps(decode_worker)
        reached = {at: asyncio.Event() for at in join_at}
        joined = {at: asyncio.Event() for at in join_at}
        join = decode_worker._batch.join

        def noted_join(sequence, first_token):
            output = join(sequence, first_token)
            if len(steps.all) in joined:
                joined[len(steps.all)].set()
            return output

        async def hold(number, slices):
            if number in join_at:
                reached[number].set()
                await soon(joined[number])

        decode_worker._batch.join = noted_join
        steps.before = hold
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(_answer(client, 20, a_tokens))]
            for at, max_tokens in join_at.items():
                await soon(reached[at])
                running.append(group.create_task(_answer(client, 20 + at, max_tokens)))
        together = [task.result() for task in running]

    # B's 3 decode steps come after step 5, C's 5 after step 12.
    sizes = [len(step) for step in steps.all]
    assert sizes == [1] * 5 + [2] * 3 + [1] * 4 + [2] * 5 + [1] * 12
    a_blocks = steps.all[0][0].blocks
    assert all(any(s.blocks is a_blocks for s in step) for step in steps.all)
    assert together == alone


async def _answer(client, length: int, max_tokens: int) -> tuple[int, ...]:
    return (await client.generate(prompt_of(length), max_tokens=max_tokens).result()).token_ids
