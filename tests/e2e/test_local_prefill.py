"""Prompts computed at the decode worker: the same tokens as through a prefill worker, and a whole
cluster without prefill workers."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_cluster import local_cluster
from local_prompts import FixedFit, answer, ask
from router_double import session_with
from tiny_models import EOS_ID, make_endless
from waiting import until

CHUNK_TOKENS = 48
FREED_S = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless(tmp_path_factory.mktemp("llama"))


def tokens_of(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


def asked(count: int, seed: int = 0) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts, of which some begin alike, and how to sample them."""
    rng = random.Random(seed)
    common = tokens_of(seed, 100)
    requests = []
    for n in range(count):
        prompt = common[: rng.choice([0, 50, 100])] + tokens_of(1000 + n, rng.randint(1, 150))
        way: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "temperature": n % 2, "seed": n}
        requests.append((prompt, way))
    return requests


async def answers(client, requests: Sequence[tuple[list[int], dict[str, Any]]]):
    results = (client.generate(p, top_k=0, top_p=1.0, **way).result() for p, way in requests)
    return [result.token_ids for result in await asyncio.gather(*results)]


@pytest.mark.parametrize("quantize", ["none", "int8"])
async def test_here_or_through_a_prefill_worker_or_both_at_once_the_tokens_are_the_same(
    model, quantize
):
    worker = {"chunk_tokens": CHUNK_TOKENS, "quantize": quantize, "kv_bytes": 16 << 20}
    requests = asked(8)
    async with local_cluster(model, worker=worker) as cluster, cluster.client() as client:
        service = cluster.decode[0]
        through = await answers(client, requests)
        service._engine.fit = FixedFit(0, 20, 33, 100)
        async with session_with(service) as session:
            beside = asyncio.create_task(answers(client, requests))
            for key, (prompt, way) in enumerate(requests):
                ask(session, service, key, prompt, **way)
            here = [await answer(session, key) for key in range(len(requests))]
            assert await beside == through
        assert here == through


async def test_a_cluster_without_prefill_workers_serves(model):
    worker = {"chunk_tokens": CHUNK_TOKENS}
    requests = asked(12)
    async with local_cluster(model, worker=worker) as cluster, cluster.client() as client:
        through = await answers(client, requests)
    async with (
        local_cluster(model, prefill=0, decode=2, worker=worker) as cluster,
        cluster.client() as client,
    ):
        assert await answers(client, requests) == through
        again = await client.generate(requests[0][0], max_tokens=2).result()
        assert again.prompt_tokens == len(requests[0][0])
        assert (await client.chat("hello", max_tokens=5).result()).completion_tokens == 5


async def test_what_a_decode_worker_has_cached_it_does_not_compute(model):
    async with local_cluster(model, prefill=0) as cluster, cluster.client() as client:
        prompt = tokens_of(1, 100)
        first = await client.generate(prompt, max_tokens=20).result()
        again = await client.generate(prompt, max_tokens=20).result()
        assert first.token_ids == again.token_ids
        assert (first.cached_tokens, again.cached_tokens) == (0, 96)


async def test_requests_wait_for_room_where_decode_workers_are_alone(model):
    async with local_cluster(model, prefill=0) as cluster:
        block_bytes = cluster.decode[0]._layout.block_bytes
    # A request takes up to 8 blocks.
    small = {"kv_bytes": 12 * block_bytes, "local_prompts_max": 2, "chunk_tokens": 16}
    async with local_cluster(model, prefill=0, worker=small) as cluster, cluster.client() as client:
        requests = [(tokens_of(n, 100), {"max_tokens": 12, "temperature": 0}) for n in range(10)]
        assert [len(tokens) for tokens in await answers(client, requests)] == [12] * 10


async def test_a_client_that_goes_while_its_prompt_is_computed_frees_it(model):
    worker = {"chunk_tokens": 16}
    async with (
        local_cluster(model, prefill=0, worker=worker) as cluster,
        cluster.client() as client,
    ):
        gate = EngineGate(cluster.decode[0], at_step=3)
        stream = client.generate(tokens_of(1, 400), max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        stream.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(cluster.decode[0]._steps.cancelled.is_set, within_s=FREED_S)
        gate.open()
        await until(cluster.all_free, within_s=FREED_S)
        assert len((await client.generate(tokens_of(1, 50), max_tokens=8).result()).token_ids) == 8
