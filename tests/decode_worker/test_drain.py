"""A decode worker that drains: it says so, takes nothing new and finishes what it has."""

import asyncio
import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_prompts import answer, ask, local_reserve, refusal
from router_double import session_with
from tiny_models import EOS_ID, make_tiny
from waiting import until

from decode_worker.reservation import ReservationEvent
from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.wire import worker_pb2

WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def tokens_of(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


@contextlib.asynccontextmanager
async def worker(model: Path, **settings: Any):
    """A decode worker alone; in the end its ledger balances."""
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        own = {"kv_bytes": 8 << 20, "chunk_tokens": 64, **settings}
        config = WorkerConfig(
            model_path=model, cluster_key="k" * 32, socket_dir=Path(folder), **own
        )
        service = await DecodeService.start(config)
        try:
            yield service
            await until(lambda: service.ledger.available == service.ledger.total, within_s=WAIT_S)
            service._handoff.cache.check()
            assert len(service._handoff) == len(service._batch) == len(service._prompts) == 0
        finally:
            await service.stop()


async def test_an_idle_worker_is_drained_at_once_and_every_router_is_told(model):
    async with worker(model, heartbeat_ms=60_000) as service, session_with(service) as one:
        await one.until(lambda: bool(one.events))
        assert not one.events[-1].load.draining
        assert await service.drain(WAIT_S)
        await one.until(lambda: one.events[-1].load.draining, within_s=10)
        async with session_with(service) as late:
            await late.until(lambda: bool(late.events))
            assert late.events[0].HasField("info")
            assert late.events[0].load.draining
            ask(late, service, 1, tokens_of(1, 20))
            failed = await refusal(late, 1)
            assert failed.code == worker_pb2.FAILURE_CODE_EXHAUSTED
            assert "draining" in failed.message
            assert all(event.load.draining for event in late.events)


async def test_what_runs_is_finished_and_what_comes_is_refused(model):
    async with worker(model) as service, session_with(service) as session:
        ask(session, service, 1, tokens_of(1, 100), max_tokens=30)
        expected = await answer(session, 1)
        gate = EngineGate(service, at_step=3)
        ask(session, service, 2, tokens_of(1, 100), max_tokens=30)
        ask(session, service, 3, tokens_of(2, 100), max_tokens=5)  # waits for its turn
        await session.event("reserved", 3)
        await gate.entered.wait()
        drained = asyncio.create_task(service.drain(WAIT_S))
        await session.until(lambda: session.events[-1].load.draining)
        told = len(session.events) - 1
        ask(session, service, 4, tokens_of(3, 20))
        assert (await refusal(session, 4)).code == worker_pb2.FAILURE_CODE_EXHAUSTED
        assert not drained.done()
        gate.open()
        assert await answer(session, 2) == expected
        assert len(await answer(session, 3)) == 5
        assert await drained
        assert all(event.load.draining for event in session.events[told:])
        assert not service._handoff.causes


async def test_a_worker_that_is_not_idle_in_time_says_so_and_can_be_asked_again(model):
    async with worker(model) as service, session_with(service) as session:
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(1, 100), max_tokens=5)
        await gate.entered.wait()
        assert not await service.drain(0.01)
        gate.open()
        assert await service.drain(WAIT_S)
        assert len(await answer(session, 1)) == 5


async def test_a_reservation_that_waits_for_its_writer_is_waited_for(model):
    async with worker(model) as service, session_with(service) as session:
        reserve = local_reserve(service, 1, tokens_of(1, 100))
        reserve.prefill_here = False
        session.send(reserve=reserve)
        await session.event("reserved", 1)
        assert not await service.drain(0.01)
        drained = asyncio.create_task(service.drain(WAIT_S))
        session.send(cancel=worker_pb2.Cancel(key=1))
        assert await drained


async def test_a_cancelled_step_ends_a_drain_when_the_engine_has_let_go(model):
    async with worker(model) as service, session_with(service) as session:
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(1, 100))
        await gate.entered.wait()
        drained = asyncio.create_task(service.drain(WAIT_S))
        session.send(cancel=worker_pb2.Cancel(key=1))
        await until(service._steps.cancelled.is_set, within_s=WAIT_S)
        assert not drained.done()
        gate.open()
        assert await drained
        assert service._handoff.causes == {ReservationEvent.CANCEL: 1}


# ---- why requests are let go of


@pytest.mark.parametrize("phase", ["reserved", "prefilling"])
async def test_a_router_that_is_lost_is_the_cause_of_what_it_loses(model, phase):
    async with worker(model) as service:
        gate = EngineGate(service)
        async with session_with(service) as session:
            reserve = local_reserve(service, 1, tokens_of(1, 100))
            reserve.prefill_here = phase == "prefilling"
            session.send(reserve=reserve)
            await session.event("reserved", 1)
            if phase == "prefilling":
                await gate.entered.wait()
        await until(lambda: bool(service._handoff.causes), within_s=WAIT_S)
        assert service._handoff.causes == {ReservationEvent.ROUTER_LOST: 1}
        gate.open()


async def test_a_lease_that_runs_out_is_a_cause_of_its_own(model):
    async with worker(model, lease_ms=50) as service, session_with(service) as session:
        reserve = local_reserve(service, 1, tokens_of(1, 100))
        reserve.prefill_here = False
        session.send(reserve=reserve)
        assert (await refusal(session, 1)).code == worker_pb2.FAILURE_CODE_EXPIRED
        assert service._handoff.causes == {ReservationEvent.TIMEOUT: 1}


async def test_an_engine_that_fails_is_a_cause_of_its_own(model):
    async with worker(model) as service, session_with(service) as session:

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of luck")

        service._engine._runner.step = broken
        ask(session, service, 1, tokens_of(1, 100))
        assert (await refusal(session, 1)).code == worker_pb2.FAILURE_CODE_INTERNAL
        assert service._handoff.causes == {ReservationEvent.FAIL: 1}
