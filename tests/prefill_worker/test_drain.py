"""A prefill worker that drains, in a whole cluster; and why its jobs are let go of."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_cluster import LocalCluster, local_cluster
from local_prompts import local_reserve
from router_double import session_with
from tiny_models import make_tiny
from waiting import until

from kvrelay.client import AsyncClient
from kvrelay.transport.errors import RefusedError, Rejection
from kvrelay.wire import worker_pb2
from kvrelay.wire.transfer_pb2 import Ticket
from prefill_worker.schedule import JobEvent

WAIT_S = 30.0
PROMPT = list(range(20, 120))  # four chunks of 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@contextlib.asynccontextmanager
async def cluster_of(
    model: Path, **settings: Any
) -> AsyncIterator[tuple[LocalCluster, AsyncClient]]:
    worker = {"chunk_tokens": 32, **settings.pop("worker", {})}
    async with (
        local_cluster(model, worker=worker, **settings) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client


async def test_an_idle_worker_is_drained_at_once_says_so_and_refuses(model):
    async with (
        cluster_of(model, worker={"heartbeat_ms": 60_000}) as (cluster, _),
        session_with(cluster.prefill[0]) as session,
    ):
        service = cluster.prefill[0]
        await session.until(lambda: bool(session.events))
        assert not session.events[-1].load.draining
        assert await service.drain(WAIT_S)
        await session.until(lambda: session.events[-1].load.draining, within_s=10)
        prefill = worker_pb2.Prefill(key=7, prompt_token_ids=[5] * 20)
        prefill.ticket.layout.CopyFrom(service._layout.to_wire())
        prefill.ticket.block_ids.extend([0, 1])
        session.send(prefill=prefill)
        await session.until(lambda: session.events[-1].WhichOneof("event") == "failed")
        failed = session.events[-1].failed
        assert (failed.key, failed.code) == (7, worker_pb2.FAILURE_CODE_EXHAUSTED)
        assert "draining" in failed.message


async def test_both_workers_finish_what_they_have(model):
    async with cluster_of(model) as (cluster, client):
        expected = await client.generate(PROMPT, max_tokens=8).result()
        gate = EngineGate(cluster.prefill[0], at_step=2)
        running = asyncio.create_task(client.generate(PROMPT[::-1], max_tokens=8).result())
        waiting = asyncio.create_task(client.generate(PROMPT, max_tokens=8).result())
        await gate.entered.wait()
        await until(lambda: len(cluster.prefill[0]._running) == 2, within_s=WAIT_S)
        workers = [*cluster.prefill, *cluster.decode]
        drained = [asyncio.create_task(worker.drain(WAIT_S)) for worker in workers]
        assert not await cluster.prefill[0].drain(0.01)
        assert not any(one.done() for one in drained)
        gate.open()
        assert (await waiting).token_ids == expected.token_ids
        assert (await running).completion_tokens == 8
        assert await asyncio.gather(*drained) == [True, True]
        assert cluster.all_free()
        assert not cluster.prefill[0]._schedule.causes


async def test_requests_go_to_workers_that_do_not_drain(model):
    async with cluster_of(model, prefill=2, decode=2) as (cluster, client):
        expected = await client.generate(PROMPT, max_tokens=8).result()
        assert await cluster.prefill[0].drain(WAIT_S)
        assert await cluster.decode[1].drain(WAIT_S)
        answers = [client.generate(PROMPT, max_tokens=8).result() for _ in range(8)]
        for answer in await asyncio.gather(*answers):
            assert answer.token_ids == expected.token_ids
        for worker in (cluster.prefill[0], cluster.decode[1]):
            assert await worker.drain(0.01), "it has taken something"


# ---- why jobs are let go of


async def test_a_cancel_is_a_cause(model):
    async with cluster_of(model) as (cluster, client):
        gate = EngineGate(cluster.prefill[0])
        stream = client.generate(PROMPT, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        stream.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await ended(cluster, JobEvent.CANCEL, gate)


async def test_a_router_that_is_lost_is_a_cause(model):
    async with cluster_of(model) as (cluster, _), session_with(cluster.decode[0]) as decode:
        gate = EngineGate(cluster.prefill[0])
        reserve = local_reserve(cluster.decode[0], 1, PROMPT)
        reserve.prefill_here = False
        decode.send(reserve=reserve)
        ticket = (await decode.event("reserved", 1)).ticket
        async with session_with(cluster.prefill[0]) as prefill:
            asked = worker_pb2.Prefill(
                key=1, prompt_token_ids=PROMPT, sampling=reserve.sampling, ticket=ticket
            )
            prefill.send(prefill=asked)
            await gate.entered.wait()
        decode.send(cancel=worker_pb2.Cancel(key=1))  # it may not have heard of a writer yet
        await ended(cluster, JobEvent.ROUTER_LOST, gate)


async def test_a_decode_worker_that_gives_up_is_a_cause(model):
    async with cluster_of(model, router={"attempts_max": 1}) as (cluster, client):

        def refuse(ticket: Ticket) -> None:
            raise RefusedError(Rejection.STALE, "not today")

        cluster.decode[0]._listener._book.begin = refuse
        reader = asyncio.create_task(client.generate(PROMPT, max_tokens=8).result())
        await asyncio.gather(reader, return_exceptions=True)
        await ended(cluster, JobEvent.DECODER_LOST)


async def test_an_engine_that_makes_no_step_is_a_cause(model):
    settings = {"worker": {"lease_ms": 300}, "router": {"attempts_max": 1}}
    async with cluster_of(model, **settings) as (cluster, client):
        cluster.decode[0]._handoff.expired = lambda now_ms: []  # its lease is as long
        gate = EngineGate(cluster.prefill[0])
        reader = asyncio.create_task(client.generate(PROMPT, max_tokens=8).result())
        await gate.entered.wait()
        causes = cluster.prefill[0]._schedule.causes
        await until(lambda: bool(causes), within_s=WAIT_S)
        await asyncio.gather(reader, return_exceptions=True)
        await ended(cluster, JobEvent.TIMEOUT, gate)


async def test_an_engine_that_fails_is_a_cause(model):
    async with cluster_of(model, router={"attempts_max": 1}) as (cluster, client):

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of luck")

        cluster.prefill[0]._engine._runner.step = broken
        reader = asyncio.create_task(client.generate(PROMPT, max_tokens=8).result())
        await asyncio.gather(reader, return_exceptions=True)
        await ended(cluster, JobEvent.FAIL)


async def ended(cluster: LocalCluster, cause: JobEvent, gate: EngineGate | None = None) -> None:
    """One job, of this cause; and all blocks are free."""
    schedule = cluster.prefill[0]._schedule
    await until(lambda: bool(schedule.causes), within_s=WAIT_S)
    if gate is not None:
        gate.open()
    await until(cluster.all_free, within_s=WAIT_S)
    assert schedule.causes == {cause: 1}
