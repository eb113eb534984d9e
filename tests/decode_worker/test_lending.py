"""A decode worker that lends its core to a neighbour, and borrows that one's."""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference
from local_prompts import answer, ask, outputs
from router_double import Session, session_with
from tiny_models import EOS_ID, make_tiny

from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.engine.cores import CoreBoard

LONG_MS = 100_000  # a target that nobody who pauses for it comes to the end of
OWN, OTHERS = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@dataclass
class Pair:
    service: DecodeService
    session: Session
    neighbour: CoreBoard  # of a worker that the test plays


@contextlib.asynccontextmanager
async def pair(model: Path, tpot_target_ms: float) -> AsyncIterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        config = WorkerConfig(
            model_path=model,
            cluster_key="k" * 32,
            socket_dir=Path(folder),
            kv_bytes=8 << 20,
            cores=(OWN,),
            borrows=(OTHERS,),
            tpot_target_ms=tpot_target_ms,
        )
        service = await DecodeService.start(config)
        try:
            async with session_with(service) as session:
                yield Pair(service, session, CoreBoard(Path(folder) / "cores", [OTHERS], [OWN]))
        finally:
            await service.stop()


def note_decode_steps(pair: Pair) -> list[bool]:
    """For each step without prompts, whether the neighbour computed as it began."""
    engine: Any = pair.service._engine
    step, noted = engine.step, []

    async def noting(slices: Any, *how: Any) -> Any:
        if all(len(s.tokens) == 1 for s in slices):
            noted.append(engine.neighbour_computes)
        return await step(slices, *how)

    engine.step = noting
    return noted


async def test_steps_wait_for_a_neighbour_that_computes_and_not_for_one_that_does_not(model):
    async with pair(model, LONG_MS) as it:
        steps = note_decode_steps(it)
        it.neighbour.claim()
        ask(it.session, it.service, 1, range(EOS_ID + 1, EOS_ID + 40), max_tokens=20)
        await it.session.event("first_token", 1)
        # A pause ends when there is something to do: the step of this one's prompt.
        ask(it.session, it.service, 2, range(EOS_ID + 2, EOS_ID + 50), max_tokens=20)
        await it.session.event("first_token", 2)
        await it.session.until(lambda: len(outputs(it.session, 1)) > 1)
        it.neighbour.release()
        ask(it.session, it.service, 3, range(EOS_ID + 3, EOS_ID + 60), max_tokens=20)
        assert [len(await answer(it.session, key)) for key in (1, 2, 3)] == [20, 20, 20]
    assert steps
    assert not any(steps)


async def test_without_a_target_no_step_waits(model):
    async with pair(model, 0.0) as it:
        it.neighbour.claim()
        ask(it.session, it.service, 1, range(EOS_ID + 1, EOS_ID + 40), max_tokens=20)
        assert len(await answer(it.session, 1)) == 20
        assert it.service._engine.neighbour_computes


async def test_tokens_are_the_same_on_borrowed_cores(model):
    prompt = list(range(EOS_ID + 1, 256))
    [expected] = reference.greedy(model, [prompt], [12])
    assert expected.margin_min > reference.MARGIN_MIN
    async with pair(model, 0.0) as it:
        ask(it.session, it.service, 1, prompt, max_tokens=12)
        tokens = await answer(it.session, 1)
    assert tokens[: len(expected.token_ids)] == expected.token_ids


@pytest.mark.parametrize(("cores", "borrows"), [((), (1,)), ((0, 1), (1, 2))])
def test_only_a_worker_with_cores_borrows_and_not_its_own(model, cores, borrows):
    with pytest.raises(ValueError, match="borrows: "):
        WorkerConfig(
            model_path=model,
            cluster_key="k" * 32,
            socket_dir=model,
            cores=cores,
            borrows=borrows,
        )
