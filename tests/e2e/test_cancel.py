"""A client that goes away, or whose deadline passes, costs nothing within one second.

Each test holds a request in one phase with a gate, cancels it there, and sees every block of both
workers free again. What runs beside it gets the tokens it would have had.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_gate import EngineGate
from local_cluster import LocalCluster, local_cluster
from tiny_models import make_tiny
from waiting import until

from cluster.model_store import prepare
from kvrelay.client import AsyncClient, KvrelayError
from kvrelay.transport.reader import ReaderLink
from kvrelay.transport.writer import Transfer

FREED_S = 1.0
PROMPT = list(range(20, 120))  # four chunks of 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@asynccontextmanager
async def cluster_of(model: Path, **worker: Any) -> AsyncIterator[tuple[LocalCluster, AsyncClient]]:
    settings = {"chunk_tokens": 32, **worker}
    async with local_cluster(model, worker=settings) as cluster, cluster.client() as client:
        yield cluster, client


async def cancel(stream: Any, reader: "asyncio.Task[Any]") -> None:
    stream.cancel()
    with pytest.raises((KvrelayError, asyncio.CancelledError)):
        await reader


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("at_chunk", [1, 3])
async def test_cancel_while_a_chunk_is_computed(model: Path, transport: str, at_chunk: int) -> None:
    async with cluster_of(model, transport=transport) as (cluster, client):
        gate = EngineGate(cluster.prefill[0], at_step=at_chunk)
        stream = client.generate(PROMPT, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        await cancel(stream, reader)
        # The decode worker need not wait for the prefill worker's engine, only for its word.
        await until(
            lambda: cluster.decode[0].ledger.available == cluster.decode[0].ledger.total,
            within_s=FREED_S,
        )
        gate.open()
        await until(cluster.all_free, within_s=FREED_S)


async def test_cancel_while_waiting_behind_another_prompt(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        expected = await client.generate(PROMPT, max_tokens=8).result()
        gate = EngineGate(cluster.prefill[0])
        first = client.generate(PROMPT, max_tokens=8)
        first_result = asyncio.create_task(first.result())
        await gate.entered.wait()
        second = client.generate(PROMPT, max_tokens=8)
        second_result = asyncio.create_task(second.result())
        await until(lambda: len(cluster.prefill[0]._schedule) == 2, within_s=10)
        await cancel(second, second_result)
        await until(lambda: len(cluster.prefill[0]._schedule) == 1, within_s=FREED_S)
        gate.open()
        assert (await first_result).token_ids == expected.token_ids
        await until(cluster.all_free, within_s=FREED_S)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_cancel_while_the_decode_worker_takes_the_commit(
    model: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(model, transport=transport) as (cluster, client):
        entered, release = asyncio.Event(), asyncio.Event()
        commit = ReaderLink._commit

        async def held(self: Any, frame: Any) -> None:
            entered.set()
            await release.wait()
            await commit(self, frame)

        monkeypatch.setattr(ReaderLink, "_commit", held)
        stream = client.generate(PROMPT, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await entered.wait()
        await cancel(stream, reader)
        release.set()
        await until(cluster.all_free, within_s=FREED_S)


async def test_cancel_while_a_decode_step_runs(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        expected = await client.generate(PROMPT[:20], max_tokens=30).result()
        bystander = client.generate(PROMPT[:20], max_tokens=30)
        bystander_result = asyncio.create_task(bystander.result())
        gate = EngineGate(cluster.decode[0], at_step=5)
        stream = client.generate(PROMPT, max_tokens=200)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        await cancel(stream, reader)
        gate.open()
        assert (await bystander_result).token_ids == expected.token_ids
        await until(cluster.all_free, within_s=FREED_S)


async def test_cancel_in_the_routers_queue(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        block_bytes = cluster.decode[0]._layout.block_bytes
    # A request here needs 8 blocks: there is room for one.
    async with cluster_of(model, kv_bytes=12 * block_bytes) as (cluster, client):
        gate = EngineGate(cluster.decode[0])
        first = client.generate(PROMPT, max_tokens=16)
        first_result = asyncio.create_task(first.result())
        await gate.entered.wait()
        waiting = client.generate(PROMPT, max_tokens=16)
        waiting_result = asyncio.create_task(waiting.result())
        dispatcher = cluster.router.fleet.dispatcher
        await until(lambda: len(dispatcher._queue) == 1, within_s=10)
        await cancel(waiting, waiting_result)
        await until(lambda: len(dispatcher) == 1, within_s=FREED_S)
        gate.open()
        assert len((await first_result).token_ids) == 16
        await until(cluster.all_free, within_s=FREED_S)


async def test_a_deadline_frees_like_a_cancel(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        gate = EngineGate(cluster.prefill[0], at_step=2)
        stream = client.generate(PROMPT, max_tokens=8, timeout_s=0.5)
        with pytest.raises(KvrelayError) as raised:
            await stream.result()
        assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.open()
        await until(cluster.all_free, within_s=FREED_S)


async def test_a_cancelled_chunk_stops_between_layers(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        gate = EngineGate(cluster.prefill[0])
        stream = client.generate(PROMPT, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        await cancel(stream, reader)
        service = cluster.prefill[0]
        await until(service._step_cancelled.is_set, within_s=FREED_S)
        gate.open()
        await until(cluster.all_free, within_s=FREED_S)
        assert (await client.generate(PROMPT, max_tokens=8).result()).completion_tokens == 8


async def test_a_long_prompt_of_a_real_model_is_let_go_within_a_second() -> None:
    model = prepare("smollm2").path
    async with cluster_of(model, kv_bytes=1 << 28, chunk_tokens=256) as (cluster, client):
        stream = client.generate([500] * 2000, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        jobs = cluster.prefill[0]._schedule._jobs
        await until(lambda: any(job.computed for job in jobs.values()), within_s=60)
        await cancel(stream, reader)
        await until(cluster.all_free, within_s=FREED_S)


async def test_a_cancel_while_the_hand_off_is_letting_go_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode worker's Abort and the router's Cancel of one request reach P together."""
    entered, release = asyncio.Event(), asyncio.Event()
    abort = Transfer.abort

    async def held(self: Transfer, reason: str) -> None:
        entered.set()
        await release.wait()
        await abort(self, reason)

    async with cluster_of(model) as (cluster, client):
        service = cluster.prefill[0]
        gate = EngineGate(service, at_step=2)
        monkeypatch.setattr(Transfer, "abort", held)
        stream = client.generate(PROMPT, max_tokens=8)
        reader = asyncio.create_task(stream.result())
        await gate.entered.wait()
        # Before it has leave to write, it would have nothing to let go of.
        reservations = cluster.decode[0]._handoff._by_key
        await until(lambda: any(r.blocks_received for r in reservations.values()), within_s=10)
        await cancel(stream, reader)
        await entered.wait()
        for push in service._running.values():
            push.task.cancel()
        release.set()
        gate.open()
        await until(cluster.all_free, within_s=FREED_S)
        assert not service._running


async def test_many_cancels_at_any_moment_leave_nothing_behind(model: Path) -> None:
    async with cluster_of(model) as (cluster, client):
        whole = await client.generate(PROMPT, max_tokens=24).result()

        async def run(index: int) -> None:
            stream = client.generate(PROMPT, max_tokens=24)
            if index % 3 == 0:
                assert (await stream.result()).token_ids == whole.token_ids
                return
            reader = asyncio.create_task(stream.result())
            for _ in range(index * 7 % 50):  # turns of the event loop: some of every phase
                await asyncio.sleep(0.001)
            stream.cancel()
            await asyncio.gather(reader, return_exceptions=True)

        await asyncio.gather(*(run(index) for index in range(48)))
        await until(cluster.all_free, within_s=FREED_S)
