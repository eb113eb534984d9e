"""Both services tell whoever has a session with them what they cache, and that they live."""

import asyncio
import contextlib
import random
from typing import Any

import pytest
from local_cluster import local_cluster
from router_double import session_with
from tiny_models import EOS_ID, make_endless

from kvrelay.kv.prefix_cache import PrefixCache
from kvrelay.wire import worker_pb2

BLOCK_SIZE = 16
ROLES = ["prefill", "decode"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_endless(tmp_path_factory.mktemp("llama"))


@contextlib.asynccontextmanager
async def heard(model, role: str, **settings: Any):
    """A cluster's client; of one role the service, its cache, and a session with it."""
    async with local_cluster(model, worker=settings) as cluster, cluster.client() as client:
        (service,) = getattr(cluster, role)
        async with session_with(service) as session:
            yield client, service, cache_of(service, role), session


def cache_of(service: Any, role: str) -> PrefixCache:
    return service._schedule.cache if role == "prefill" else service._handoff.cache


def names_in(cache: PrefixCache) -> set[bytes]:
    return set(cache._block_of)


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


@pytest.mark.parametrize("role", ROLES)
async def test_a_router_knows_what_is_cached_however_it_comes_and_goes(model, role):
    block_bytes = 3 * 2 * BLOCK_SIZE * 2 * 16 * 4  # layers, K and V, tokens, heads, values, bytes
    small = {"kv_bytes": 24 * block_bytes}  # a request takes 10
    async with heard(model, role, **small) as (client, _, cache, session):
        for seed in (1, 2, 3, 1, 4, 5, 1):
            await client.generate(tokens(seed, 150), max_tokens=9).result()
            await session.until(lambda: session.blocks.names == names_in(cache))
        assert len(cache) <= 24
        assert any(message.removed for message in session.blocks.messages)
        assert not any(message.everything for message in session.blocks.messages[1:])


@pytest.mark.parametrize("role", ROLES)
async def test_a_session_begins_with_who_it_is_and_everything(model, role):
    async with heard(model, role) as (client, service, cache, first):
        await client.generate(tokens(1, 100), max_tokens=2).result()
        await first.until(lambda: first.blocks.names == names_in(cache))
        async with session_with(service) as second:
            await second.until(lambda: bool(second.blocks.messages))
            assert [event.WhichOneof("event") for event in second.events] == ["info"]
            assert second.blocks.names == names_in(cache)
            assert len(second.blocks.names) == 6


@pytest.mark.parametrize("role", ROLES)
async def test_a_router_that_asks_hears_everything_again_and_others_do_not(model, role):
    async with (
        heard(model, role) as (client, service, cache, one),
        session_with(service) as other,
    ):
        await client.generate(tokens(1, 100), max_tokens=2).result()
        await one.until(lambda: one.blocks.names == names_in(cache))
        one.send(resync=worker_pb2.Resync())
        await one.until(lambda: one.blocks.messages[-1].everything and bool(one.blocks.names))
        assert one.blocks.names == names_in(cache)
        await client.generate(tokens(2, 100), max_tokens=2).result()
        for session in (one, other):
            await session.until(lambda s=session: s.blocks.names == names_in(cache))
        assert [message.everything for message in other.blocks.messages].count(True) == 1


@pytest.mark.parametrize("role", ROLES)
async def test_a_worker_without_caching_caches_nothing_and_says_so(model, role):
    async with heard(model, role, prefix_caching=False) as (client, _, _, session):
        await client.generate(tokens(1, 100), max_tokens=2).result()
        await session.until(lambda: bool(session.blocks.messages))
        assert [message.everything for message in session.blocks.messages] == [True]
        assert not session.blocks.names


@pytest.mark.parametrize("role", ROLES)
async def test_an_idle_worker_says_how_busy_it_is(model, role):
    async with heard(model, role, heartbeat_ms=10) as (_, service, _, session):
        await session.until(lambda: len(session.events) > 5)
        info, *beats = session.events
        assert info.WhichOneof("event") == "info"
        assert all(beat.WhichOneof("event") is None for beat in beats)
        assert all(beat.HasField("load") for beat in beats)
        if role == "decode":
            assert beats[-1].load.blocks_free == service.ledger.total


@pytest.mark.parametrize("role", ROLES)
async def test_a_worker_whose_announcer_fails_is_replaced(model, role):
    """Or routers would go on with what it cached once."""
    async with heard(model, role, heartbeat_ms=5) as (_, service, _, _):

        def broken() -> None:
            raise RuntimeError("broken")

        service._sessions.announcer.beat = broken
        with pytest.raises(RuntimeError, match="broken"):
            async with asyncio.timeout(30):
                await service.wait_for_end()
