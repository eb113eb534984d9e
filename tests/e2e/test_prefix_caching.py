"""Prefix caching through whole clusters: what is cached on either side is neither computed nor
sent, no token changes for it, and every block is free or cached in the end."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import asynccontextmanager

import pytest
from local_cluster import local_cluster
from tiny_models import EOS_ID, make_endless
from waiting import until

from kvrelay.client import KvrelayError
from kvrelay.kv.ledger import BlockState
from kvrelay.transport.reader import ReaderLink

BLOCK_SIZE = 16
WAIT_S = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_endless(tmp_path_factory.mktemp("llama"))


def cluster_of(model, *, blocks: int = 64, caching: bool = True, **more):
    settings = {"block_size": BLOCK_SIZE, "chunk_tokens": 32, "prefix_caching": caching, **more}
    counts = {name: settings.pop(name) for name in ("prefill", "decode") if name in settings}
    worker = {**settings, "kv_bytes": blocks * block_bytes(model)}
    # What is sent is counted, so prompts are always handed over.
    return local_cluster(model, worker=worker, router={"local_prefill": "never"}, **counts)


def block_bytes(model) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head_dim = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * BLOCK_SIZE * config.num_key_value_heads * head_dim * 4


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


class Watched:
    """Notes what an engine computes, and sees to it that it writes into nobody else's blocks."""

    def __init__(self, worker) -> None:
        self.tokens = 0
        self._ledger = worker.ledger
        self._step = worker._engine.step
        worker._engine.step = self._watched

    async def _watched(self, slices, *how):
        for s in slices:
            self.tokens += len(s.tokens)
            for block in s.blocks[s.start // BLOCK_SIZE : -(-s.end // BLOCK_SIZE)]:
                assert self._ledger.state(block) is BlockState.OWNED
        return await self._step(slices, *how)


@asynccontextmanager
async def watched(model, **how):
    async with cluster_of(model, **how) as cluster, cluster.client() as client:
        steps = [Watched(worker) for worker in (*cluster.prefill, *cluster.decode)]
        yield cluster, client, steps


async def answers_without(model, *requests: tuple[Sequence[int], int]) -> list[tuple[int, ...]]:
    """What each request gets from workers that cache nothing."""
    async with cluster_of(model, caching=False) as cluster, cluster.client() as client:
        got = [await client.generate(p, max_tokens=n).result() for p, n in requests]
        assert {one.cached_tokens for one in got} == {0}
        for worker in (*cluster.prefill, *cluster.decode):
            assert worker.ledger.free == worker.ledger.total
        return [one.token_ids for one in got]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("length", [15, 16, 17, 95, 96, 97, 100])
async def test_the_same_prompt_twice(model, transport, length):
    prompt = tokens(length, length)
    (expected,) = await answers_without(model, (prompt, 9))
    async with watched(model, transport=transport) as (_, client, (prefill, _)):
        first = await client.generate(prompt, max_tokens=9).result()
        assert (first.cached_tokens, prefill.tokens) == (0, length)
        assert first.timings.kv_bytes == -(-length // BLOCK_SIZE) * block_bytes(model)
        second = await client.generate(prompt, max_tokens=9).result()
    assert first.token_ids == second.token_ids == expected
    cached = (length - 1) // BLOCK_SIZE * BLOCK_SIZE  # P needs the last token's logits ...
    assert (second.cached_tokens, prefill.tokens) == (cached, 2 * length - cached)
    # ... D needs none: only a block that is not full is sent.
    assert second.timings.kv_bytes == (length % BLOCK_SIZE > 0) * block_bytes(model)


async def test_sampled_answers_are_the_same_too(model):
    prompt = tokens(1, 50)
    async with watched(model) as (_, client, _):
        same = [
            await client.generate(prompt, max_tokens=20, temperature=1.0, seed=7).result()
            for _ in range(3)
        ]
    assert len({one.token_ids for one in same}) == 1
    assert [one.cached_tokens for one in same] == [0, 48, 48]


async def test_prompts_that_begin_alike_share_what_they_have_in_common(model):
    common = tokens(1, 70)
    prompts = [common + tokens(seed, 30) for seed in range(2, 6)]
    expected = await answers_without(model, *((prompt, 6) for prompt in prompts))
    async with watched(model) as (_, client, _):
        one = await client.generate(prompts[0], max_tokens=6).result()
        rest = await asyncio.gather(
            *(client.generate(prompt, max_tokens=6).result() for prompt in prompts[1:])
        )
    assert [answer.token_ids for answer in (one, *rest)] == expected
    assert [answer.cached_tokens for answer in rest] == [64] * 3
    assert {answer.timings.kv_bytes for answer in rest} == {3 * block_bytes(model)}


async def test_running_answers_share_blocks(model):
    prompt = tokens(1, 64)
    async with watched(model, blocks=14) as (cluster, client, _):
        await client.generate(prompt, max_tokens=1).result()
        # Each needs 4 blocks for the prompt and 2 for its answer: apart they would not fit.
        streams = [client.generate(prompt, max_tokens=30) for _ in range(4)]
        most = 0
        running = [asyncio.create_task(stream.result()) for stream in streams]
        while not all(task.done() for task in running):
            most = max(most, len(cluster.decode[0]._batch))
            await asyncio.sleep(0)
        assert len({(await task).token_ids for task in running}) == 1
    assert most >= 3


async def test_the_next_turn_of_a_chat_reuses_prompt_and_answer(model):
    turn = tokens(1, 40)
    async with watched(model) as (_, client, (prefill, decode)):
        for number in range(4):
            answer = await client.generate(turn, max_tokens=25).result()
            (expected,) = await answers_without(model, (turn, 25))
            assert answer.token_ids == expected
            sent = -(-len(turn) // BLOCK_SIZE) * block_bytes(model)
            if number:
                # D has the whole turn before but its last token's KV; P has its prompt.
                missing = -(-len(turn) // BLOCK_SIZE) - (len(turn) - 11) // BLOCK_SIZE
                sent = missing * block_bytes(model)
                assert answer.cached_tokens == (len(turn) - 35) // BLOCK_SIZE * BLOCK_SIZE
            assert answer.timings.kv_bytes == sent
            turn = [*turn, *answer.token_ids, *tokens(number + 2, 10)]
    assert decode.tokens == 4 * 24
    assert prefill.tokens < 40 + 3 * 55


async def test_a_pool_that_is_too_small_for_all_evicts_and_stays_right(model):
    requests = [(tokens(seed, 60), 5) for seed in range(6)]
    expected = await answers_without(model, *requests)
    dice = random.Random(1)
    order = [dice.randrange(6) for _ in range(30)]
    async with watched(model, blocks=9) as (cluster, client, _):  # one or two of the six
        answers = [
            await client.generate(requests[i][0], max_tokens=requests[i][1]).result() for i in order
        ]
        cached = cluster.decode[0].ledger.counts()[BlockState.CACHED]
        assert 0 < cached <= 9
    assert [answer.token_ids for answer in answers] == [expected[i] for i in order]
    assert any(answer.cached_tokens for answer in answers)


async def test_without_caching_nothing_is_kept(model):
    async with watched(model, caching=False) as (cluster, client, (prefill, _)):
        for _ in range(2):
            answer = await client.generate(tokens(1, 100), max_tokens=3).result()
            assert answer.cached_tokens == 0
            assert answer.timings.kv_bytes == 7 * block_bytes(model)
        assert prefill.tokens == 200
        await until(lambda: cluster.prefill[0].ledger.free == 64, within_s=1)
        assert cluster.decode[0].ledger.free == 64


async def test_one_side_may_cache_without_the_other(model):
    """D alone caches: P computes all, sends what D lacks."""
    prompt = tokens(1, 100)
    async with watched(model) as (cluster, client, (prefill, _)):
        off = cluster.prefill[0]._config.model_copy(update={"prefix_caching": False})
        cluster.prefill[0]._config = off
        first = await client.generate(prompt, max_tokens=5).result()
        second = await client.generate(prompt, max_tokens=5).result()
    assert first.token_ids == second.token_ids
    assert (second.cached_tokens, prefill.tokens) == (0, 200)
    assert second.timings.kv_bytes == block_bytes(model)


# ---- cancels and deaths


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_cancels_in_every_phase_leave_the_shared_blocks_whole(model, transport):
    common = tokens(1, 64)
    prompts = [common + tokens(seed, 64) for seed in range(2, 5)]
    expected = await answers_without(model, *((prompt, 24) for prompt in prompts))
    async with watched(model, blocks=40, transport=transport) as (cluster, client, _):

        async def run(index: int) -> None:
            stream = client.generate(prompts[index % 3], max_tokens=24)
            if index % 3 == 0:
                assert (await stream.result()).token_ids == expected[0]
                return
            reader = asyncio.create_task(stream.result())
            for _ in range(index * 7 % 60):
                await asyncio.sleep(0.001)
            stream.cancel()
            await asyncio.gather(reader, return_exceptions=True)

        await asyncio.gather(*(run(index) for index in range(48)))
        await until(cluster.all_free, within_s=2)
        cluster.check_ledgers()
        after = [await client.generate(prompt, max_tokens=24).result() for prompt in prompts]
    assert [answer.token_ids for answer in after] == expected


async def test_a_cancel_while_a_wholly_cached_prompt_is_committed(model, monkeypatch):
    prompt = tokens(1, 64)
    async with watched(model) as (cluster, client, _):
        first = await client.generate(prompt, max_tokens=8).result()
        entered, release = asyncio.Event(), asyncio.Event()
        commit = ReaderLink._commit

        async def held(self, frame):
            entered.set()
            await release.wait()
            await commit(self, frame)

        with monkeypatch.context() as patch:
            patch.setattr(ReaderLink, "_commit", held)
            stream = client.generate(prompt, max_tokens=8)
            reader = asyncio.create_task(stream.result())
            async with asyncio.timeout(WAIT_S):
                await entered.wait()
            stream.cancel()
            with pytest.raises((KvrelayError, asyncio.CancelledError)):
                await reader
            release.set()
            await until(cluster.all_free, within_s=1)
        again = await client.generate(prompt, max_tokens=8).result()
        assert again.token_ids == first.token_ids
        assert again.timings.kv_bytes == 0


async def test_nobody_inherits_kv_that_gave_nan(model):
    prompt = tokens(1, 64)
    async with watched(model) as (cluster, client, _):
        first = await client.generate(prompt, max_tokens=8).result()
        decode = cluster.decode[0]
        (block,) = decode._handoff.cache.match(list(decode._handoff.cache._block_of))[:1]
        decode._engine.pool.kv[block].fill_(float("nan"))
        # The attempt that meets it fails; the next one finds nothing of that prefix.
        second = await client.generate(prompt, max_tokens=8).result()
    assert second.token_ids == first.token_ids
    assert second.timings.kv_bytes >= 4 * block_bytes(model)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_dies_takes_its_cache_and_nothing_else(model, role):
    prompt = tokens(1, 100)
    (expected,) = await answers_without(model, (prompt, 60))
    async with watched(model, prefill=2, decode=2) as (cluster, client, _):
        for _ in range(2):
            assert (await client.generate(prompt, max_tokens=60).result()).token_ids == expected
        stream = client.generate(prompt, max_tokens=60)
        reader = asyncio.create_task(stream.result())
        dispatcher = cluster.router.fleet.dispatcher
        await until(lambda: any(len(r.answer) > 2 for r in dispatcher._attempts.all()), within_s=9)
        (request,) = dispatcher._attempts.all()
        workers = getattr(cluster, role)
        dead = next(w for w in workers if w.instance_id in (request.prefill_id, request.decode_id))
        await dead.stop()
        assert (await reader).token_ids == expected
        again = await client.generate(prompt, max_tokens=60).result()
        assert again.token_ids == expected
        workers.remove(dead)
        await until(cluster.all_free, within_s=2)
