"""Answers that run without a router: who lets them go, and when."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_cluster import local_cluster
from local_prompts import ask, failure
from router_double import Session, session_with
from tiny_models import make_tiny
from waiting import until

from decode_worker.reservation import ReservationEvent
from decode_worker.service import DecodeService
from kvrelay.wire import worker_pb2

WAIT_S = 10.0
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@contextlib.asynccontextmanager
async def worker(model: Path, **settings: Any) -> AsyncIterator[DecodeService]:
    """In the end nothing is left in it."""
    async with local_cluster(model, prefill=0, routers=0, worker=settings) as cluster:
        service = cluster.decode[0]
        yield service
        await until(lambda: not len(service._handoff), within_s=WAIT_S)
        await until(lambda: not len(service._kept), within_s=WAIT_S)
        service._kept.check()


async def answering(session: Session, service: DecodeService, key: int, max_tokens: int) -> None:
    ask(session, service, key, PROMPT, max_tokens=max_tokens)
    await session.event("first_token", key)


async def orphans(service: DecodeService, count: int) -> None:
    await until(lambda: len(service._kept.orphans()) == count, within_s=WAIT_S)


async def test_a_router_that_is_back_wants_nothing_of_what_it_had(model):
    async with worker(model) as service:
        async with session_with(service, "A") as a, session_with(service, "B") as b:
            await answering(a, service, 1, 400)
            await answering(b, service, 2, 400)
            gate = EngineGate(service)
            await gate.entered.wait()
        await orphans(service, 2)
        async with session_with(service, "C"), session_with(service):
            async with session_with(service, "A"):
                await orphans(service, 1)
            [(_, left)] = service._kept.orphans()
            assert left == 2
            async with session_with(service, "B"):
                await orphans(service, 0)
        gate.open()
        await until(lambda: not len(service._handoff), within_s=WAIT_S)
        assert service._handoff.causes == {ReservationEvent.CANCEL: 2}


async def test_a_router_that_is_back_before_its_session_has_ended_wants_nothing_of_it(model):
    async with worker(model) as service, contextlib.AsyncExitStack() as old:
        session = await old.enter_async_context(session_with(service, "A"))
        await answering(session, service, 1, 400)
        gate = EngineGate(service)
        await gate.entered.wait()
        async with session_with(service, "A") as new:
            await new.until(lambda: bool(new.events))
            await old.aclose()
            await until(lambda: not len(service._kept), within_s=WAIT_S)
        gate.open()


def share(service: DecodeService, part: float) -> int:
    """Tokens that take this part of the pool."""
    return int(service.ledger.total * part) * service._layout.block_size


async def test_the_oldest_orphan_makes_room(model):
    async with worker(model, batch_max=1) as service, contextlib.AsyncExitStack() as routers:
        sessions, ends = {}, {}
        for key in (1, 2):
            ends[key] = await routers.enter_async_context(contextlib.AsyncExitStack())
            sessions[key] = await ends[key].enter_async_context(session_with(service, f"R{key}"))
            await answering(sessions[key], service, key, share(service, 0.4))
        gate = EngineGate(service)
        await gate.entered.wait()
        [(_, stepping)] = service._steps._in_step
        waiting = 3 - stepping
        await ends[waiting].aclose()  # the other one's blocks are the running step's
        await orphans(service, 1)
        await ends[stepping].aclose()
        await orphans(service, 2)
        async with session_with(service, "C") as session:
            ask(session, service, 3, PROMPT, max_tokens=share(service, 0.4))
            await session.event("reserved", 3)
            assert [key for _, key in service._kept.orphans()] == [stepping]
            session.send(cancel=worker_pb2.Cancel(key=3))
            session.send(adopt=worker_pb2.Adopt(key=4, request_id=f"request-{stepping}"))
            await session.event("adopted", 4)
            session.send(cancel=worker_pb2.Cancel(key=4))
            await until(lambda: not len(service._kept), within_s=WAIT_S)
        gate.open()


async def test_the_room_of_an_orphan_in_a_step_is_there_after_the_step(model):
    async with worker(model) as service:
        async with session_with(service, "A") as first:
            await answering(first, service, 1, share(service, 0.6))
            gate = EngineGate(service)
            await gate.entered.wait()
        await orphans(service, 1)
        async with session_with(service, "B") as session:
            ask(session, service, 2, PROMPT, max_tokens=share(service, 0.6))
            await session.until(lambda: failure(session, 2) is not None, within_s=WAIT_S)
            assert failure(session, 2).code == worker_pb2.FAILURE_CODE_EXHAUSTED
            gate.open()
            total = service.ledger.total
            await session.until(
                lambda: session.events[-1].load.blocks_free == total, within_s=WAIT_S
            )
            ask(session, service, 3, PROMPT, max_tokens=share(service, 0.6))
            await session.event("reserved", 3)
            session.send(cancel=worker_pb2.Cancel(key=3))
            await until(lambda: not len(service._kept), within_s=WAIT_S)


async def test_a_worker_that_blips_does_not_work_twice(model):
    async with local_cluster(model) as cluster, cluster.client() as client:
        service = cluster.decode[0]
        right = await client.generate(PROMPT, max_tokens=100).result()
        gate = EngineGate(service)  # of the first step of the answer
        again = asyncio.create_task(client.generate(PROMPT, max_tokens=100).result())
        await gate.entered.wait()
        [session] = service._sessions._open
        session.end()
        await until(lambda: service._handoff.causes[ReservationEvent.CANCEL] == 1, within_s=WAIT_S)
        assert service._kept.orphans() == []
        gate.open()
        assert (await again).token_ids == right.token_ids
        await until(cluster.all_free, within_s=WAIT_S)
