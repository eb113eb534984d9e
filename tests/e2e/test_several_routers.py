"""Several routers on one set of workers: none knows of the others, and no request is the worse."""

import asyncio
import random

import pytest
from local_cluster import local_cluster
from reference import MARGIN_MIN, greedy
from tiny_models import EOS_ID, make_endless, make_tiny
from waiting import until

from router.recovery import Recovery

BLOCK_SIZE = 16
BLOCK_BYTES = 3 * 2 * BLOCK_SIZE * 2 * 16 * 4  # of the tiny llama: layers, KV, heads, head_dim
WAIT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_endless(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """One that ends its answers by itself, now and then, as transformers can as well."""
    return make_tiny("llama", tmp_path_factory.mktemp("ending"))


@pytest.fixture
def refused(monkeypatch):
    """Who was refused by a worker for want of room: the routers, once for each time."""
    seen: list[Recovery] = []
    refuse = Recovery._refused

    def noted(self, *args):
        seen.append(self)
        return refuse(self, *args)

    monkeypatch.setattr(Recovery, "_refused", noted)
    return seen


def cluster_of(model, *, blocks: int, local_prefill: str = "never", routers: int = 2):
    worker = {"block_size": BLOCK_SIZE, "kv_bytes": blocks * BLOCK_BYTES, "chunk_tokens": 32}
    router = {"local_prefill": local_prefill}
    return local_cluster(model, routers=routers, worker=worker, router=router)


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


@pytest.mark.parametrize("local_prefill", ["never", "auto"])
async def test_no_request_is_lost_when_both_want_the_same_room(ending, refused, local_prefill):
    """Each answer takes up to half of the pool, and each router believes that it has all of it."""
    asked = [(tokens(seed, 20 + seed), 40 - seed % 20) for seed in range(40)]
    right = greedy(ending, [p for p, _ in asked], [n for _, n in asked])
    async with cluster_of(ending, blocks=12, local_prefill=local_prefill) as cluster:
        a, b = (cluster.client(router) for router in cluster.routers)
        async with a, b, asyncio.timeout(WAIT_S):
            answers = await asyncio.gather(
                *(
                    (a, b)[at % 2].generate(prompt, max_tokens=count).result()
                    for at, (prompt, count) in enumerate(asked)
                )
            )
        await until(cluster.all_free, within_s=2)
        assert [len(router.fleet.dispatcher) for router in cluster.routers] == [0, 0]
        for router in cluster.routers:
            router.fleet.dispatcher.check()
    for answer, reference in zip(answers, right, strict=True):
        assert answer.token_ids == reference.token_ids or reference.margin_min < MARGIN_MIN
    assert refused, "they never were in each other's way"


async def test_a_prompt_sent_through_one_router_is_cached_for_the_other(model):
    prompt = tokens(1, 100)
    async with cluster_of(model, blocks=64) as cluster:
        a, b = (cluster.client(router) for router in cluster.routers)
        async with a, b:
            first = await a.generate(prompt, max_tokens=5).result()
            second = await b.generate(prompt, max_tokens=5).result()
    assert (first.cached_tokens, second.cached_tokens) == (0, 96)
    assert second.timings.kv_bytes == BLOCK_BYTES  # the block that is not full
    assert second.token_ids == first.token_ids


async def test_what_one_router_ran_is_gone_with_it_and_the_other_goes_on(model):
    prompt = tokens(2, 40)
    async with cluster_of(model, blocks=24) as cluster:
        a, b = (cluster.client(router) for router in cluster.routers)
        async with a, b, asyncio.timeout(WAIT_S):
            expected = await b.generate(prompt, max_tokens=200).result()
            running = aiter(a.generate(tokens(3, 40), max_tokens=300))
            await anext(running)
            # It wants more than the other leaves.
            waiting = asyncio.create_task(b.generate(prompt, max_tokens=200).result())
            dispatcher = cluster.routers[1].fleet.dispatcher
            await until(lambda: dispatcher.queued == 1, within_s=5)
            await cluster.routers[0].stop()
            assert (await waiting).token_ids == expected.token_ids
        await until(cluster.all_free, within_s=2)
        del cluster.routers[0]


async def test_equal_request_ids_at_two_routers_are_two_requests(model):
    prompts = tokens(4, 30), tokens(5, 50)
    async with cluster_of(model, blocks=64) as cluster:
        a, b = (cluster.client(router) for router in cluster.routers)
        async with a, b:
            alone = [await a.generate(prompt, max_tokens=30).result() for prompt in prompts]
            together = await asyncio.gather(
                *(
                    client.generate(prompt, max_tokens=30, request_id="same").result()
                    for client, prompt in zip((a, b), prompts, strict=True)
                )
            )
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
