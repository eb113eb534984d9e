"""Answers that outlive their router's session at a decode worker; the test plays the routers."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_gate import EngineGate
from local_prompts import answer, ask, failure, outputs, refusal
from router_double import Session, session_with
from tiny_models import make_tiny
from waiting import until

from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.wire import worker_pb2

WAIT_S = 30.0
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Reserves here name no end token, so an answer has all the tokens it was asked for.
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@contextlib.asynccontextmanager
async def worker(model: Path, **settings: Any) -> AsyncIterator[DecodeService]:
    """In the end nothing is left in it."""
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        own = {"kv_bytes": 8 << 20, **settings}
        config = WorkerConfig(
            model_path=model, cluster_key="k" * 32, socket_dir=Path(folder), **own
        )
        service = await DecodeService.start(config)
        try:
            yield service
            await until(lambda: all_gone(service), within_s=WAIT_S)
            service._handoff.cache.check()
            service._kept.check()
        finally:
            await service.stop()


def all_gone(service: DecodeService) -> bool:
    parts = (service._handoff, service._prompts, service._batch, service._kept)
    return not any(map(len, parts)) and service.ledger.available == service.ledger.total


async def adopt(session: Session, key: int, request_id: str, tenant: str = "") -> Any:
    session.send(adopt=worker_pb2.Adopt(key=key, tenant=tenant, request_id=request_id))
    return await session.event("adopted", key)


async def rest(session: Session, adopted: Any) -> list[int]:
    """All tokens of the answer, those that came with the adoption first."""
    key, tokens = adopted.key, list(adopted.token_ids)
    if not adopted.ending:
        await session.until(
            lambda: (
                failure(session, key) is not None or any(o.ending for o in outputs(session, key))
            ),
            within_s=WAIT_S,
        )
    assert failure(session, key) is None
    for output in outputs(session, key):
        assert output.offset == len(tokens)
        tokens += output.token_ids
    return tokens


async def expected(service: DecodeService, max_tokens: int) -> list[int]:
    async with session_with(service) as session:
        ask(session, service, 1, PROMPT, max_tokens=max_tokens)
        tokens = list(await answer(session, 1))
        session.send(acknowledge=worker_pb2.Acknowledge(keys=[1]))
        await until(lambda: not len(service._kept), within_s=WAIT_S)
    return tokens


async def test_an_answer_goes_on_without_its_router_and_with_the_next_one(model):
    async with worker(model) as service:
        right = await expected(service, 100)
        async with session_with(service) as first:
            reserve = ask(first, service, 7, PROMPT, max_tokens=100)
            await first.event("first_token", 7)
            gate = EngineGate(service)
            await gate.entered.wait()  # it loses its router in the middle of a step
        await until(lambda: not service._sessions._open, within_s=WAIT_S)
        async with session_with(service) as second:
            adopted = await adopt(second, 3, "request-7")  # and finds another in the same
            assert 1 <= len(adopted.token_ids) < 100
            assert list(adopted.reserve.prompt_token_ids) == PROMPT
            assert adopted.reserve.sampling == reserve.sampling
            assert not adopted.reserve.block_hashes
            gate.open()
            assert await rest(second, adopted) == right
            second.send(acknowledge=worker_pb2.Acknowledge(keys=[3]))
            await until(lambda: all_gone(service), within_s=WAIT_S)


async def test_a_router_that_has_not_gone_is_told(model):
    async with worker(model) as service:
        right = await expected(service, 100)
        async with session_with(service) as first, session_with(service) as second:
            ask(first, service, 7, PROMPT, max_tokens=100)
            await first.event("first_token", 7)
            gate = EngineGate(service)
            await gate.entered.wait()
            adopted = await adopt(second, 7, "request-7")
            assert (await refusal(first, 7)).code == worker_pb2.FAILURE_CODE_TAKEN_OVER
            sent = len(outputs(first, 7))
            first.send(cancel=worker_pb2.Cancel(key=7))  # it is not its any more
            gate.open()
            assert await rest(second, adopted) == right
            assert len(outputs(first, 7)) == sent
            second.send(cancel=worker_pb2.Cancel(key=7))  # whole: as good as acknowledged
            await until(lambda: all_gone(service), within_s=WAIT_S)


async def test_who_adopted_it_may_cancel_it(model):
    async with worker(model) as service:
        async with session_with(service) as first:
            ask(first, service, 7, PROMPT, max_tokens=400)
            await first.event("first_token", 7)
        async with session_with(service) as second:
            await adopt(second, 1, "request-7")
            second.send(cancel=worker_pb2.Cancel(key=1))
            await until(lambda: all_gone(service), within_s=WAIT_S)


async def test_an_engine_that_fails_an_adopted_answer_says_so_to_its_new_router(model):
    async with worker(model) as service:
        async with session_with(service) as first:
            ask(first, service, 7, PROMPT, max_tokens=400)
            await first.event("first_token", 7)
        async with session_with(service) as second:
            await adopt(second, 1, "request-7")

            def broken(*_: Any) -> Any:
                raise RuntimeError("out of luck")

            service._engine._runner.step = broken
            failed = await refusal(second, 1)
            assert failed.code == worker_pb2.FAILURE_CODE_INTERNAL
            assert all_gone(service)


@pytest.mark.parametrize("max_tokens", [2, 400])
async def test_what_nobody_comes_for_is_let_go(model, max_tokens):
    async with worker(model, kept_ms=1) as service:
        async with session_with(service) as first:
            ask(first, service, 7, PROMPT, max_tokens=max_tokens)
            await first.event("first_token", 7)
        await until(lambda: all_gone(service), within_s=WAIT_S)
        async with session_with(service) as second:
            second.send(adopt=worker_pb2.Adopt(key=1, request_id="request-7"))
            assert (await refusal(second, 1)).code == worker_pb2.FAILURE_CODE_NOT_KEPT


async def test_what_is_not_there_is_not_kept(model):
    async with worker(model) as service, session_with(service) as session:
        gate = EngineGate(service)
        ask(session, service, 7, PROMPT)  # its prompt is being computed
        await gate.entered.wait()
        for key, wish in ((1, {"request_id": "request-7"}), (2, {"request_id": "request-8"})):
            session.send(adopt=worker_pb2.Adopt(key=key, **wish))
            assert (await refusal(session, key)).code == worker_pb2.FAILURE_CODE_NOT_KEPT
        gate.open()
        await answer(session, 7)
        session.send(adopt=worker_pb2.Adopt(key=3, request_id="request-7", tenant="other"))
        assert (await refusal(session, 3)).code == worker_pb2.FAILURE_CODE_NOT_KEPT
        session.send(acknowledge=worker_pb2.Acknowledge(keys=[7]))
        await until(lambda: all_gone(service), within_s=WAIT_S)
