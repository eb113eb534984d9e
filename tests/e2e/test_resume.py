"""Routers die and hang under running answers: clients go on elsewhere, and get what they would
have had, every token and every character once."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from local_cluster import LocalCluster, local_cluster
from router_process import RouterProcess, router_process
from tiny_models import make_endless
from waiting import until

from kvrelay.client import AsyncClient, Completion
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

WAIT_S = 120.0
STEP_S = 0.01  # a step of a worker, at least: answers must not be over before their router is
TEXT = "the rain in spain stays mainly"

# What is asked, and how: (method, prompt, options).
ASKED: list[tuple[str, Any, dict[str, Any]]] = [
    ("generate", TEXT, {"max_tokens": 150}),
    ("generate", list(range(10, 60)), {"max_tokens": 120, "temperature": 1.0, "seed": 7}),
    ("generate", TEXT, {"max_tokens": 150, "temperature": 0.8, "stop": ["zzzz", "qqqq", "~"]}),
    ("chat", "say something", {"max_tokens": 140, "temperature": 0.9, "top_p": 0.9}),
    (
        "chat",
        [{"role": "user", "content": "once more"}],
        {"max_tokens": 130, "temperature": 1.0, "repetition_penalty": 1.2, "min_tokens": 100},
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_endless(tmp_path_factory.mktemp("endless"))


@dataclass
class Bench:
    """Workers of ours, a router of ours that survives, and others that do not."""

    cluster: LocalCluster
    folder: Path

    @property
    def survivor(self) -> str:
        return self.cluster.router.address

    @contextlib.asynccontextmanager
    async def victim(self) -> AsyncIterator[RouterProcess]:
        cluster = self.cluster
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            config = cluster.router._config
            async with router_process(config, Path(folder)) as router:
                await router.tell(
                    [p.address for p in cluster.prefill], [d.address for d in cluster.decode]
                )
                yield router

    def client(self, victim: RouterProcess, **more: Any) -> AsyncClient:
        address = f"{victim.address},{self.survivor}"
        return AsyncClient(address, timeout_s=WAIT_S, **more)

    async def settled(self) -> None:
        """Nothing of any request is left anywhere."""
        kept = [worker._kept for worker in self.cluster.decode]
        await until(lambda: self.cluster.all_free() and not any(map(len, kept)), within_s=30)
        for each in kept:
            each.check()
        dispatcher = self.cluster.router.fleet.dispatcher
        dispatcher.check()
        assert len(dispatcher) == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(model) -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        settings = {"local_prefill": "auto"}
        async with local_cluster(model, decode=2, router=settings) as cluster:
            for worker in cluster.decode:
                slow_down(worker)
            yield Bench(cluster, Path(folder))


pytestmark = pytest.mark.asyncio(loop_scope="module")


def slow_down(worker: Any) -> None:
    runner = worker._engine._runner
    step = runner.step

    def slower(*how: Any) -> Any:
        time.sleep(STEP_S)
        return step(*how)

    runner.step = slower


def ask(client: AsyncClient, asked: tuple[str, Any, dict[str, Any]], **more: Any) -> Any:
    method, prompt, options = asked
    return getattr(client, method)(prompt, **options, **more)


async def some_of(stream: Any, tokens: int) -> str:
    """Reads until there are so many; the text that came with them."""
    text, seen = "", 0
    async for delta in stream.deltas():
        text += delta.text
        seen += len(delta.token_ids)
        if seen >= tokens:
            return text
    raise AssertionError("the answer ended before")


async def rest_of(stream: Any) -> tuple[str, Completion]:
    text = "".join([piece async for piece in stream])
    return text, await stream.result()


async def unfaulted(bench: Bench, answer: Completion, asked: tuple[str, Any, dict[str, Any]]) -> Completion:
    """The same request, by its seed, when nothing fails."""
    async with AsyncClient(bench.survivor, timeout_s=WAIT_S) as client:
        method, prompt, options = asked
        return await ask(client, (method, prompt, {**options, "seed": answer.seed})).result()


async def test_answers_go_on_when_their_router_is_killed(bench):
    async with bench.victim() as victim, bench.client(victim) as client:
        adopted = count_adopted(bench)
        streams = [ask(client, asked) for asked in ASKED]
        begun = await asyncio.gather(*(some_of(s, 3 + 7 * n) for n, s in enumerate(streams)))
        await victim.kill()
        ends = await asyncio.gather(*map(rest_of, streams))
        for first, (rest, answer), asked in zip(begun, ends, ASKED, strict=True):
            right = await unfaulted(bench, answer, asked)
            assert answer.token_ids == right.token_ids
            assert first + rest == answer.text == right.text
            assert (answer.finish_reason, answer.prompt_tokens) == (
                right.finish_reason,
                right.prompt_tokens,
            )
            assert answer.resumed == 1
        assert adopted() == len(ASKED)  # none was computed again
        assert client._servers.first == 1  # who works is asked first from now on
    await bench.settled()


def count_adopted(bench: Bench) -> Any:
    adopted = []
    for worker in bench.cluster.decode:
        kept = worker._kept
        plain = type(kept).adopt

        def noted(name, holder, kept=kept, plain=plain):
            found = plain(kept, name, holder)
            adopted.append(found)
            return found

        kept.adopt = noted
    return lambda: sum(found is not None for found in adopted)
