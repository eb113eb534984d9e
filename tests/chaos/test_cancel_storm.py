"""Many requests, half of them cancelled in any phase: what they held is free within a second.

Who is cancelled, when, and what all of them ask for is drawn from KVRELAY_SEED. Those that nobody
cancels have exactly the tokens that they have alone.
"""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from asked import Asked, check, oracle
from local_cluster import local_cluster
from seeds import SEED, playable
from step_counter import StepCounter
from tiny_models import make_tiny
from waiting import until

from kvrelay.client import AsyncClient, Completion, KvrelayError

FREED_S = 1.0
STEPS_ON_THE_WAY = 5  # of the decode worker while a cancel comes from client to it, mostly
AT_ONCE = 48
KINDS = 12  # of requests that run to their end, each asked for many times
LAST = 12  # of those cancelled, when all the others have ended
CANCELLED_TOKENS = 400  # they would take
DELAY_MS = 40  # in which a request of these comes through most phases


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_half_of_the_requests_are_cancelled(model: Path, transport: str) -> None:
    with playable(SEED):
        await storm(model, transport, 75)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_half_of_a_thousand_requests_are_cancelled(
    model: Path, transport: str, report: Callable[[str], None]
) -> None:
    with playable(SEED):
        report(await storm(model, transport, 1_000))


async def storm(model: Path, transport: str, count: int) -> str:
    rng = random.Random(f"{transport} {SEED}")
    async with oracle(model) as right:
        known = await right.draw(rng, KINDS)
    settings = {"transport": transport, "chunk_tokens": 32, "kv_bytes": 32 << 20}
    async with (
        asyncio.timeout(600),
        local_cluster(model, worker=settings) as cluster,
        cluster.client() as client,
    ):
        counter = StepCounter(cluster)
        async with counter.watching():
            last_s = await _Storm(client, known, rng, counter).rage(count)
            left_s = FREED_S - (time.monotonic() - last_s)
            waited_s = await until(cluster.all_free, within_s=left_s)
        assert counter.aborted > 0
        assert counter.most <= 1, "steps were computed for nobody"
        steps = counter.after_cancel
        assert median(steps) <= STEPS_ON_THE_WAY, f"cancels come late: {steps}"
        held_s = [0.0, *counter.held_s]
        assert held_s[-1] <= FREED_S, f"a worker held what its client had cancelled: {held_s}"
        freed_ms = (FREED_S - left_s + waited_s) * 1000
        return (
            f"{count} requests, {counter.aborted} aborted on D, at most {counter.most} step too "
            f"many; {median(steps):g} steps (at most {steps[-1]}) since the client's cancel, held "
            f"for {held_s[-1] * 1000:.0f} ms at most; all free {freed_ms:.0f} ms after "
            "the last cancel"
        )


class _Storm:
    def __init__(
        self,
        client: AsyncClient,
        known: list[tuple[Asked, Completion]],
        rng: random.Random,
        counter: StepCounter,
    ) -> None:
        self._client = client
        self._counter = counter
        self._known = known
        self._rng = rng
        self._room = asyncio.Semaphore(AT_ONCE)
        self._last_cancel_s = 0.0

    async def rage(self, count: int) -> float:
        """Ends with some cancels while nothing else runs; when the last of them was."""
        runs = [self._whole if at % 2 else self._cancelled for at in range(count)]
        self._rng.shuffle(runs)
        async with asyncio.TaskGroup() as group:
            for run in runs:
                await self._room.acquire()
                group.create_task(run(random.Random(self._rng.random())))
        async with asyncio.TaskGroup() as group:
            for _ in range(LAST):
                await self._room.acquire()
                group.create_task(self._cancelled(random.Random(self._rng.random())))
        return self._last_cancel_s

    async def _whole(self, rng: random.Random) -> None:
        try:
            await check(self._client, *rng.choice(self._known))
        finally:
            self._room.release()

    async def _cancelled(self, rng: random.Random) -> None:
        """After some time, or after some tokens."""
        prompt = [rng.randrange(5, 270) for _ in range(rng.randint(1, 200))]
        name = f"cancelled-{rng.getrandbits(62)}"
        stream = self._client.generate(
            prompt,
            max_tokens=CANCELLED_TOKENS,
            ignore_eos=True,
            seed=rng.getrandbits(31),
            request_id=name,
        )
        tokens = rng.choice([None, None, 1, 2, rng.randint(3, 100)])
        reader = asyncio.create_task(_read(stream, tokens))
        if tokens is None:
            await asyncio.sleep(rng.uniform(0, DELAY_MS) / 1000)
        else:
            await reader
        stream.cancel()
        self._counter.cancelled(name)
        self._last_cancel_s = time.monotonic()
        await asyncio.gather(reader, return_exceptions=True)
        self._room.release()


async def _read(stream: Any, tokens: int | None) -> None:
    """Up to so many tokens, or for ever."""
    seen = 0
    try:
        async for delta in stream.deltas():
            seen += len(delta.token_ids)
            if tokens is not None and seen >= tokens:
                return
    except KvrelayError:
        assert tokens is None
