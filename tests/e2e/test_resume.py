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
STEP_S = 0.01  # a step while a test needs it slow: answers must not be over before their router is
TEXT = "the rain in spain stays mainly"

Asked = tuple[str, Any, dict[str, Any]]  # the client's method, prompt, options
ASKED: list[Asked] = [
    ("generate", TEXT, {"max_tokens": 150}),
    ("generate", list(range(10, 60)), {"max_tokens": 120, "temperature": 1.0, "seed": 7}),
    (
        "generate",
        TEXT,
        {"max_tokens": 150, "temperature": 0.8, "seed": 3, "stop": ["zzzz", "qqqq", "~"]},
    ),
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
    pace: "Pace"

    @property
    def survivor(self) -> str:
        return self.cluster.router.address

    @contextlib.asynccontextmanager
    async def victim(self, **settings: Any) -> AsyncIterator[RouterProcess]:
        cluster = self.cluster
        self.pace.step_s = STEP_S
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            config = cluster.router._config
            async with router_process(config, Path(folder), **settings) as router:
                await router.tell(
                    [p.address for p in cluster.prefill], [d.address for d in cluster.decode]
                )
                yield router

    def client(self, victim: RouterProcess, **more: Any) -> AsyncClient:
        address = f"{victim.address},{self.survivor}"
        return AsyncClient(address, timeout_s=WAIT_S, **more)

    async def settled(self) -> None:
        """Nothing of any request is left anywhere. A router that is killed may not have
        acknowledged its last answer: that is kept for kept_ms."""
        kept = [worker._kept for worker in self.cluster.decode]
        kept_s = self.cluster.decode[0]._config.kept_ms / 1000
        await until(
            lambda: self.cluster.all_free() and not any(map(len, kept)), within_s=30 + kept_s
        )
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
            yield Bench(cluster, Path(folder), Pace(cluster.decode))


pytestmark = pytest.mark.asyncio(loop_scope="module")


class Pace:
    """Makes the steps of decode workers take a while, until it is told to hurry."""

    def __init__(self, workers: list[Any]) -> None:
        self.step_s = STEP_S
        for worker in workers:
            self._slow_down(worker._engine._runner)

    def _slow_down(self, runner: Any) -> None:
        step = runner.step

        def slower(*how: Any) -> Any:
            time.sleep(self.step_s)
            return step(*how)

        runner.step = slower

    def hurry(self) -> None:
        self.step_s = 0.0


def ask(client: AsyncClient, asked: Asked, **more: Any) -> Any:
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


async def check(bench: Bench, answer: Completion, text: str, asked: Asked) -> None:
    """Against the same request, by its seed, when nothing fails."""
    async with AsyncClient(bench.survivor, timeout_s=WAIT_S) as client:
        method, prompt, options = asked
        right = await ask(client, (method, prompt, {**options, "seed": answer.seed})).result()
    assert answer.token_ids == right.token_ids
    assert text == answer.text == right.text
    assert answer.finish_reason == right.finish_reason
    assert answer.prompt_tokens == right.prompt_tokens


async def test_answers_go_on_when_their_router_is_killed(bench):
    async with bench.victim() as victim, bench.client(victim) as client:
        adopted = count_adopted(bench)
        streams = [ask(client, asked) for asked in ASKED]
        begun = await asyncio.gather(*(some_of(s, 3 + 7 * n) for n, s in enumerate(streams)))
        await victim.kill()
        bench.pace.hurry()
        ends = await asyncio.gather(*map(rest_of, streams))
        for first, (rest, answer), asked in zip(begun, ends, ASKED, strict=True):
            await check(bench, answer, first + rest, asked)
            assert answer.resumed == 1
        assert adopted() == len(ASKED)  # none was computed again
        assert client._servers.first == 1  # who works is asked first from now on
    await bench.settled()


async def test_answers_go_on_when_their_router_ends_in_order_before_they_do(bench):
    asked = ("generate", TEXT, {"max_tokens": 400, "temperature": 1.0, "stop": ["zzzz"]})
    async with bench.victim(drain_ms=100) as victim, bench.client(victim) as client:
        adopted = count_adopted(bench)
        stream = ask(client, asked)
        begun = await some_of(stream, 3)
        await victim.end()
        bench.pace.hurry()
        rest, answer = await rest_of(stream)
        await check(bench, answer, begun + rest, asked)
        assert (answer.resumed, adopted()) == (1, 1)
    await bench.settled()


async def test_an_answer_that_is_whole_when_its_router_dies_is_kept(bench):
    asked = ("generate", TEXT, {"max_tokens": 40, "temperature": 1.0})
    async with bench.victim() as victim, bench.client(victim) as client:
        adopted = count_adopted(bench)
        stream = ask(client, asked)
        begun = await some_of(stream, 3)
        victim.stop()  # what D says from here on, nobody passes on
        bench.pace.hurry()
        await until(lambda: any(w._kept._whole for w in bench.cluster.decode), within_s=WAIT_S)
        await victim.kill()
        bench.pace.hurry()
        rest, answer = await rest_of(stream)
        assert adopted() == 1
    await check(bench, answer, begun + rest, asked)
    await bench.settled()


async def test_a_router_that_hangs_is_left_and_does_no_harm_when_it_goes_on(bench):
    asked = ("chat", "tell me more", {"max_tokens": 400, "temperature": 1.0})
    async with bench.victim() as victim, bench.client(victim) as client:
        stream = ask(client, asked)
        begun = await some_of(stream, 3)
        victim.stop()
        adopted = count_adopted(bench)
        more = await some_of(stream, 5)  # by the other router
        bench.pace.hurry()
        assert adopted() == 1
        victim.go_on()
        rest, answer = await rest_of(stream)
        await check(bench, answer, begun + more + rest, asked)
        async with AsyncClient(victim.address, timeout_s=WAIT_S) as other:  # it serves again
            assert len((await other.generate(TEXT, max_tokens=5).result()).token_ids) == 5
        await victim.end()
    await bench.settled()


async def test_a_decode_worker_that_dies_as_well_makes_it_ask_again(model):
    asked = ("generate", TEXT, {"max_tokens": 100, "temperature": 1.0, "stop": ["zzzz"]})
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        async with local_cluster(model, decode=2) as cluster:
            bench = Bench(cluster, Path(folder), Pace(cluster.decode))
            async with bench.victim() as victim, bench.client(victim) as client:
                stream = ask(client, asked)
                begun = await some_of(stream, 10)
                victim.stop()
                [lost] = [w for w in cluster.decode if len(w._batch)]
                await lost.stop()
                cluster.decode.remove(lost)
                await victim.kill()
                bench.pace.hurry()
                rest, answer = await rest_of(stream)
            assert answer.resumed == 1
            await check(bench, answer, begun + rest, asked)
            await bench.settled()


# ---- the RPC


async def read_on(call: Any, seen: list[int]) -> None:
    async for event in call:
        seen += event.delta.token_ids


async def resume(bench: Bench, **wish: Any) -> grpc.aio.UnaryStreamCall:
    async with grpc.aio.insecure_channel(bench.survivor) as channel:
        call = InferenceStub(channel).Resume(pb.ResumeRequest(**wish), timeout=WAIT_S)
        return [event async for event in call]


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"request_id": "nobody's"}, 'no worker keeps request "nobody\'s": ask again'),
        ({"request_id": "mine", "kept_at": "nowhere"}, "no worker keeps request 'mine': ask again"),
        ({}, "request_id"),
        ({"request_id": "a" * 1000}, "request_id"),
    ],
)
async def test_what_can_not_be_resumed(bench, wish, why):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await resume(bench, **wish)
    expected = grpc.StatusCode.NOT_FOUND if "keeps" in why else grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.code() is expected
    assert why in caught.value.details()


async def test_a_request_that_runs_here_goes_on_in_the_call_that_resumes_it(bench):
    bench.pace.step_s = STEP_S
    sampling = pb.SamplingParams(max_tokens=200)
    request = pb.GenerateRequest(request_id="mine", text=TEXT, sampling=sampling)
    async with grpc.aio.insecure_channel(bench.survivor) as channel:
        call = InferenceStub(channel).Generate(request, timeout=WAIT_S)
        seen: list[int] = []
        mine: dict[str, Any] = {"request_id": "mine"}
        async for event in call:
            seen += event.delta.token_ids
            if event.HasField("accepted"):
                mine["nonce"] = event.accepted.nonce
            if len(seen) >= 5:
                break
        with pytest.raises(grpc.aio.AioRpcError, match="another request 'mine' runs here"):
            await resume(bench, request_id="mine")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resume(bench, **mine, next_offset=500)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "tokens of request 'mine' are known here" in caught.value.details()
        accepted, *deltas, finished = await resume(bench, **mine, next_offset=3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(call, seen)
        assert caught.value.code() is grpc.StatusCode.ABORTED
    assert accepted.accepted.request_id == "mine"
    assert deltas[0].delta.offset == 3
    assert deltas[0].delta.kept_at in [worker.instance_id for worker in bench.cluster.decode]
    again = [token for event in deltas for token in event.delta.token_ids]
    assert len(again) == 197
    assert again[: len(seen) - 3] == seen[3:]
    assert finished.finished.completion_tokens == 200
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
