"""Prompts that a decode worker computes itself, asked for by a router that the test plays."""

import asyncio
import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import reference
from engine_gate import EngineGate
from local_prompts import FixedFit, answer, ask, failure, local_reserve, outputs, refusal
from router_double import session_with
from tiny_models import EOS_ID, make_tiny
from waiting import until

from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.engine.sampling import NOT_A_NUMBER
from kvrelay.wire import worker_pb2

BLOCK_SIZE = 16
CHUNK_TOKENS = 64
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Reserves here name no end token, so an answer has all the tokens it was asked for.
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def tokens_of(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(EOS_ID + 1, 256), k=count)


@contextlib.asynccontextmanager
async def worker(model: Path, **settings: Any):
    """A decode worker alone, and a session with it; in the end its ledger balances."""
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        own = {"kv_bytes": 8 << 20, "chunk_tokens": CHUNK_TOKENS, **settings}
        config = WorkerConfig(
            model_path=model, cluster_key="k" * 32, socket_dir=Path(folder), **own
        )
        service = await DecodeService.start(config)
        try:
            async with session_with(service) as session:
                yield service, session
            await until(lambda: all_free(service), within_s=WAIT_S)
            service._handoff.cache.check()
            assert len(service._handoff) == len(service._prompts) == len(service._batch) == 0
        finally:
            await service.stop()


def all_free(service: DecodeService) -> bool:
    return service.ledger.available == service.ledger.total


def expected_of(model: Path, prompt: list[int], max_tokens: int) -> tuple[int, ...]:
    """Up to the end token."""
    [expected] = reference.greedy(model, [prompt], [max_tokens])
    assert expected.margin_min > reference.MARGIN_MIN
    return expected.token_ids


class Steps:
    """Notes the slices of every step of a worker's engine, as (start, tokens)."""

    def __init__(self, service: DecodeService) -> None:
        self.all: list[list[tuple[int, int]]] = []
        self._step = service._engine.step
        service._engine.step = self._noted

    async def _noted(self, slices, *how):
        self.all.append([(s.start, len(s.tokens)) for s in slices])
        return await self._step(slices, *how)


# ---- the way of one prompt


async def test_a_prompt_is_computed_and_its_answer_goes_on(model):
    prompt = tokens_of(1, 150)
    async with worker(model) as (service, session):
        steps = Steps(service)
        ask(session, service, 7, prompt, max_tokens=12)
        tokens = await answer(session, 7)
        kinds = [e.WhichOneof("event") for e in session.events]
        reserved = await session.event("reserved", 7)
        started = await session.event("started", 7)
        first = await session.event("first_token", 7)
    assert tokens[: len(expected_of(model, prompt, 12))] == expected_of(model, prompt, 12)
    assert not reserved.HasField("ticket")
    assert started.cached_tokens == 0
    assert (first.token_id, first.prefill_ms > 0) == (tokens[0], True)
    in_order = [kind for kind in kinds if kind in ("reserved", "started", "first_token", "step")]
    assert in_order[:4] == ["reserved", "started", "first_token", "step"]
    assert steps.all == [[(0, 64)], [(64, 64)], [(128, 22)], *([(150 + n, 1)] for n in range(11))]


async def test_what_is_cached_is_not_computed_but_for_the_last_tokens_block(model):
    async with worker(model) as (service, session):
        prompt = tokens_of(2, 96)
        ask(session, service, 1, prompt)
        first = await answer(session, 1)
        ask(session, service, 2, prompt)
        assert await answer(session, 2) == first
        assert (await session.event("started", 2)).cached_tokens == 80
        ask(session, service, 3, [*prompt, *first, 9])  # the answer's full blocks, too
        await answer(session, 3)
        assert (await session.event("started", 3)).cached_tokens == 96


async def test_blocks_can_be_shared_before_the_prompt_is_computed_as_a_whole(model):
    async with worker(model) as (service, session):
        prompt = tokens_of(3, 200)
        gate = EngineGate(service, at_step=3)
        ask(session, service, 1, prompt)
        await gate.entered.wait()
        ask(session, service, 2, prompt)
        await session.event("reserved", 2)
        gate.open()
        assert await answer(session, 2) == await answer(session, 1)
        assert (await session.event("started", 2)).cached_tokens == 3 * CHUNK_TOKENS


async def test_prompts_that_wait_together_compute_what_they_share_once(model):
    async with worker(model, itl_target_ms=0) as (service, session):
        prompt = tokens_of(3, 200)
        steps, gate = Steps(service), EngineGate(service)
        ask(session, service, 1, prompt, max_tokens=5)
        await gate.entered.wait()
        for key in (2, 3):
            ask(session, service, key, prompt, max_tokens=5)
            await session.event("reserved", key)
        gate.open()
        answers = [await answer(session, key) for key in (1, 2, 3)]
        started = [(await session.event("started", n)).cached_tokens for n in (1, 2, 3)]
        cached = [(await session.event("first_token", n)).cached_tokens for n in (1, 2, 3)]
    assert answers == [answers[0]] * 3
    assert started == [0, 64, 128]
    assert cached == [128, 128, 128]  # each has computed 64 of the others' and the last 8
    assert sum(count for step in steps.all for _, count in step if count > 1) == 192 + 3 * 8


async def test_an_answer_of_one_token_ends_with_the_prompt(model):
    async with worker(model) as (service, session):
        steps = Steps(service)
        ask(session, service, 1, tokens_of(4, 20), max_tokens=1)
        assert len(await answer(session, 1)) == 1
        assert steps.all == [[(0, 20)]]
        assert outputs(session, 1)[0].ending == worker_pb2.ENDING_LENGTH


async def test_a_worker_says_what_it_keeps_to_what_steps_cost_and_what_waits(model):
    async with worker(model, itl_target_ms=77) as (service, session):
        await session.until(lambda: bool(session.events))
        assert session.events[0].info.itl_target_ms == 77
        assert session.events[0].info.chunk_tokens == CHUNK_TOKENS
        assert session.events[0].load.cost == worker_pb2.StepCost()
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(5, 100), max_tokens=20)
        await gate.entered.wait()
        ask(session, service, 2, tokens_of(6, 50))
        await session.event("reserved", 2)
        load = session.events[-1].load
        assert (load.queued_tokens, load.queued_prompts) == (150, 2)
        gate.open()
        await answer(session, 1)
        await answer(session, 2)
        load = session.events[-1].load
        assert load.queued_tokens == 0
        assert load.cost != worker_pb2.StepCost()


# ---- beside others


async def test_every_running_sequence_gets_a_token_in_every_step_of_a_prompt(model):
    async with worker(model) as (service, session):
        service._engine.fit = FixedFit(40)
        ask(session, service, 1, tokens_of(7, 10), max_tokens=60)
        await session.event("first_token", 1)
        steps = Steps(service)
        ask(session, service, 2, tokens_of(8, 150), max_tokens=2)
        await session.event("first_token", 2)
        await answer(session, 1)
        with_chunks = [step for step in steps.all if any(n > 1 for _, n in step)]
        assert [step[1] for step in with_chunks] == [
            (0, 32),
            (32, 32),
            (64, 32),
            (96, 32),
            (128, 22),
        ]
        assert all(step[0][1] == 1 for step in with_chunks)
        offsets = [output.offset for output in outputs(session, 1)]
        assert offsets == list(range(60))


async def test_a_short_prompt_does_not_wait_for_a_long_one_to_end(model):
    async with worker(model) as (service, session):
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(9, 1000), max_tokens=1)
        await gate.entered.wait()
        ask(session, service, 2, tokens_of(10, 30), max_tokens=1)
        await session.event("reserved", 2)
        steps = Steps(service)
        gate.open()
        await answer(session, 2)
        assert failure(session, 1) is None
        assert not outputs(session, 1)
        assert steps.all[0] == [(0, 30), (64, 32)]


@pytest.mark.parametrize("seed", range(4))
async def test_tokens_do_not_depend_on_how_prompts_are_cut_and_batched(model, seed):
    rng = random.Random(seed)
    common = tokens_of(seed, 70)
    prompts = [
        [
            *common[: rng.choice([0, 0, 33, 64, 70])],
            *tokens_of(100 + n, rng.choice([1, 16, 47, 160])),
        ]
        for n in range(6)
    ]
    ways: list[dict[str, Any]] = [
        {"max_tokens": rng.randint(1, 25), "temperature": rng.choice([0.0, 1.0]), "seed": n}
        for n in range(6)
    ]
    ways[0]["repetition_penalty"] = 1.5
    ways[1]["min_tokens"] = 2
    settings = {"chunk_tokens": rng.choice([16, 48, 256]), "batch_max": rng.choice([2, 64])}
    async with worker(model, prefix_caching=bool(seed % 2), **settings) as (service, session):
        alone = []
        for n, (prompt, way) in enumerate(zip(prompts, ways, strict=True)):
            ask(session, service, n, prompt, **way)
            alone.append(await answer(session, n))
        service._engine.fit = FixedFit(*(rng.choice([0, 17, 31, 64, 300]) for _ in range(50)))
        for n, (prompt, way) in enumerate(zip(prompts, ways, strict=True)):
            ask(session, service, 10 + n, prompt, **way)
            for _ in range(rng.randint(0, 20)):
                await asyncio.sleep(0)
        assert [await answer(session, 10 + n) for n in range(6)] == alone


# ---- refusals


async def test_a_prompt_that_is_not_in_the_message_is_refused(model):
    async with worker(model) as (service, session):
        for key, kept in ((1, 0), (2, 19)):
            reserve = local_reserve(service, key, tokens_of(1, 20))
            del reserve.prompt_token_ids[kept:]
            session.send(reserve=reserve)
            failed = await refusal(session, key)
            assert failed.code == worker_pb2.FAILURE_CODE_INVALID
            assert f"{kept} tokens sent of a prompt of 20" in failed.message
        assert all_free(service)


async def test_more_prompts_than_may_wait_are_refused_for_now(model):
    async with worker(model, local_prompts_max=1) as (service, session):
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(1, 20))
        await gate.entered.wait()
        ask(session, service, 2, tokens_of(2, 20))
        failed = await refusal(session, 2)
        assert failed.code == worker_pb2.FAILURE_CODE_EXHAUSTED
        assert "1 prompts are to be computed here already" in failed.message
        gate.open()
        await answer(session, 1)
        ask(session, service, 3, tokens_of(2, 20))
        await answer(session, 3)


# ---- letting go


async def test_a_cancelled_chunk_that_nobody_else_is_in_stops_between_layers(model):
    async with worker(model) as (service, session):
        gate = EngineGate(service, at_step=2)
        ask(session, service, 1, tokens_of(1, 200))
        await gate.entered.wait()
        session.send(cancel=worker_pb2.Cancel(key=1))
        await until(service._steps.cancelled.is_set, within_s=WAIT_S)
        assert not all_free(service)  # the engine may still write
        gate.open()
        await until(lambda: all_free(service), within_s=WAIT_S)
        assert len(service._handoff.cache) == CHUNK_TOKENS // BLOCK_SIZE
        ask(session, service, 2, tokens_of(1, 200))
        expected = expected_of(model, tokens_of(1, 200), 8)
        assert (await answer(session, 2))[: len(expected)] == expected


async def test_a_cancelled_chunk_beside_others_ends_with_its_step(model):
    async with worker(model) as (service, session):
        ask(session, service, 1, tokens_of(1, 10), max_tokens=30)
        expected = await answer(session, 1)
        service._engine.fit = FixedFit(16)
        ask(session, service, 2, tokens_of(1, 10), max_tokens=30)
        await session.event("first_token", 2)
        gate = EngineGate(service, at_step=3)
        ask(session, service, 3, tokens_of(2, 200))
        await gate.entered.wait()
        session.send(cancel=worker_pb2.Cancel(key=3))
        await until(lambda: len(service._prompts) == 0, within_s=WAIT_S)
        assert not service._steps.cancelled.is_set()
        gate.open()
        assert await answer(session, 2) == expected
        assert not outputs(session, 3)


async def test_a_cancel_of_a_prompt_that_waits_for_its_turn_frees_it_at_once(model):
    async with worker(model) as (service, session):
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(1, 200))
        await gate.entered.wait()
        before = service.ledger.available
        ask(session, service, 2, tokens_of(2, 200))
        await session.event("reserved", 2)
        session.send(cancel=worker_pb2.Cancel(key=2))
        await until(lambda: service.ledger.available == before, within_s=WAIT_S)
        gate.open()
        await answer(session, 1)


async def test_a_router_that_goes_takes_its_prompts_with_it(model):
    async with worker(model) as (service, _):
        gate = EngineGate(service)
        async with session_with(service) as other:
            ask(other, service, 1, tokens_of(1, 200))
            ask(other, service, 2, tokens_of(2, 200))
            await gate.entered.wait()
        await until(service._steps.cancelled.is_set, within_s=WAIT_S)
        gate.open()
        await until(lambda: all_free(service), within_s=WAIT_S)


async def test_cancels_at_any_moment_leave_nothing_behind(model):
    async with worker(model) as (service, session):
        rng = random.Random(5)
        service._engine.fit = FixedFit(0, 32, 64)
        whole = {n: tokens_of(n, rng.choice([20, 100, 300])) for n in range(30)}
        for n, prompt in whole.items():
            ask(session, service, n, prompt, max_tokens=10)
            for _ in range(rng.randint(0, 30)):
                await asyncio.sleep(0)
            if n % 3:
                cancelled = rng.choice([m for m in range(max(1, n - 6), n + 1) if m % 3])
                session.send(cancel=worker_pb2.Cancel(key=cancelled))
        for n in range(0, 30, 3):
            assert len(await answer(session, n)) == 10
        await until(lambda: len(service._handoff) == 0, within_s=60)


# ---- what goes wrong


async def test_a_step_that_fails_ends_who_was_in_it_and_nobody_else(model):
    async with worker(model) as (service, session):
        runner = service._engine._runner
        step = runner.step

        def broken(*args, **kwargs):
            runner.step = step
            raise RuntimeError("out of luck")

        runner.step = broken
        ask(session, service, 1, tokens_of(1, 100))
        failed = await refusal(session, 1)
        assert failed.code == worker_pb2.FAILURE_CODE_INTERNAL
        assert "out of luck" in failed.message
        ask(session, service, 2, tokens_of(1, 100))
        await answer(session, 2)


async def test_a_prompt_that_gives_no_numbers_fails_and_nobody_shares_its_kv(model):
    async with worker(model) as (service, session):
        runner = service._engine._runner
        step = runner.step
        ask(session, service, 1, tokens_of(1, 10), max_tokens=200)
        await session.event("first_token", 1)

        def spoilt(slices, *how):
            logits = step(slices, *how)
            if len(slices) > 1 and slices[-1].end == 100:
                logits = logits.clone()
                logits[-1, 5] = float("nan")
            return logits

        runner.step = spoilt
        ask(session, service, 2, tokens_of(2, 100))
        failed = await refusal(session, 2)
        assert (failed.code, failed.message) == (worker_pb2.FAILURE_CODE_INTERNAL, NOT_A_NUMBER)
        runner.step = step
        ask(session, service, 3, tokens_of(2, 100))
        assert (await session.event("started", 3)).cached_tokens == 0
        assert len(await answer(session, 1)) == 200
        await answer(session, 3)


async def test_a_prompt_at_an_engine_that_makes_no_step_gives_up_in_the_end(model):
    async with worker(model, lease_ms=200) as (service, session):
        gate = EngineGate(service)
        ask(session, service, 1, tokens_of(1, 100))
        await gate.entered.wait()
        failed = await refusal(session, 1)
        assert failed.code == worker_pb2.FAILURE_CODE_EXPIRED
        gate.open()
        await until(lambda: all_free(service), within_s=WAIT_S)
