"""An engine that does not end a step, in a worker whose event loop lives."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_cluster import LocalCluster, local_cluster
from router_double import session_with
from tiny_models import make_tiny
from waiting import until

from kvrelay.engine.host import EngineHangsError

WAIT_S = 20.0
PROMPT = list(range(20, 120))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def hang_soon(service: Any) -> EngineGate:
    """From the next step on; found within 0.1 s, and other workers keep the time they have."""
    gate = EngineGate(service)
    service._engine._step_s_max = 0.1
    return gate


async def is_over(service: Any, cluster: LocalCluster) -> None:
    """The worker has ended, as whoever replaces it learns, and its router has lost it."""
    with pytest.raises(EngineHangsError, match=r"not ended a step in 0\.1 s"):
        async with asyncio.timeout(WAIT_S):
            await service.wait_for_end()
    role = "prefill" if service in cluster.prefill else "decode"
    await until(lambda: cluster.router.fleet.connected(role) == 1, within_s=WAIT_S)
    async with session_with(service, ends=True) as late:
        await asyncio.wait_for(late.over.wait(), WAIT_S)
        assert late.events == []


async def stops_at_once(service: Any) -> None:
    """Though its engine's thread goes on."""
    async with asyncio.timeout(WAIT_S):
        await service.stop()


async def test_streams_of_a_decode_worker_whose_engine_hangs_go_on_elsewhere(model):
    async with local_cluster(model, decode=2) as cluster, cluster.client() as client:
        right = await client.generate(PROMPT, max_tokens=200).result()
        gates = []
        tokens: list[int] = []
        async with asyncio.timeout(WAIT_S):
            async for delta in client.generate(PROMPT, max_tokens=200).deltas():
                tokens += delta.token_ids
                if not gates:
                    [hung] = [d for d in cluster.decode if len(d._handoff)]
                    gates.append(hang_soon(hung))
        assert tuple(tokens) == tuple(right.token_ids)
        await is_over(hung, cluster)
        await stops_at_once(hung)
        gates[0].open()
        cluster.decode.remove(hung)  # its blocks go with its process


async def test_prompts_of_a_prefill_worker_whose_engine_hangs_are_computed_elsewhere(model):
    async with local_cluster(model, prefill=2) as cluster, cluster.client() as client:
        hung, other = cluster.prefill
        fleet, decode = cluster.router.fleet, [d.address for d in cluster.decode]
        fleet.set_workers([hung.address], decode)
        gate = hang_soon(hung)
        answer = asyncio.create_task(client.generate(PROMPT, max_tokens=8).result())
        await asyncio.wait_for(gate.entered.wait(), WAIT_S)
        fleet.set_workers([hung.address, other.address], decode)
        tokens = (await asyncio.wait_for(answer, WAIT_S)).token_ids
        assert tokens == (await client.generate(PROMPT, max_tokens=8).result()).token_ids
        await is_over(hung, cluster)
        await stops_at_once(hung)
        gate.open()
        cluster.prefill.remove(hung)
