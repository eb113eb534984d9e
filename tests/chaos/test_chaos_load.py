"""The clients of `kvrelay chaos`, and its look at the ledgers, on a cluster in one process."""

import time
from types import SimpleNamespace

import grpc
import pytest
from local_cluster import LocalCluster, local_cluster
from waiting import until

from cluster.chaos.answers import Answer, difference
from cluster.chaos.asking import Asking, LostError
from cluster.chaos.asks import Ask
from cluster.chaos.http_stream import Piece
from cluster.chaos.leaks import blocks_used
from cluster.chaos.load import Load, Plan
from cluster.chaos.model import tiny_model
from cluster.chaos.streams import Stream
from kvrelay.client import KvrelayError
from kvrelay.kv.ledger import BlockEvent

ASKS = 16


@pytest.fixture(scope="module")
def model():
    return tiny_model(lambda what, share: None).path


async def opened(cluster: LocalCluster, **more) -> Load:
    """With the right answers to all asks."""
    load = Load()
    addresses = {"grpc": (cluster.router.address,), "http": (cluster.router.http_address,)}
    given = {"seed": 1, "mix": "soak", "rate": 200.0, "asks": ASKS, "http_share": 0.3, **more}
    await load.open(**Plan(**addresses, **given).model_dump())
    for first in range(0, ASKS, 4):
        await load.reference(first, 4)
    return load


async def ended(load: Load, count: int) -> list[dict]:
    """The streams, once so many have ended."""
    await load.begin()
    await until(lambda: len(load._streams) - len(load._running) >= count, within_s=60)
    return (await load.end())["streams"]


async def test_what_is_asked_again_is_answered_alike(model):
    async with local_cluster(model) as cluster:
        streams = await ended(await opened(cluster), 60)
        await until(cluster.all_free, within_s=2)
    outcomes = {stream["outcome"] for stream in streams}
    assert outcomes <= {"answered", "cancelled"}, [s["trouble"] for s in streams if s["trouble"]]
    assert {stream["ask"] for stream in streams} >= {0, 1, 2}
    assert all(stream["tokens"] for stream in streams if stream["outcome"] == "answered")
    assert all(stream["silences"] for stream in streams)


async def test_an_answer_that_is_another_one_is_found(model):
    async with local_cluster(model) as cluster:
        load = await opened(cluster, cancel_share=0.0)
        right = load._right[3]
        load._right[3] = Answer(right.text + "x", (*right.token_ids, 7), right.finish_reason)
        streams = await ended(load, 100)
    wrong = {stream["ask"] for stream in streams if stream["outcome"] == "wrong"}
    assert wrong == {3}


async def test_a_request_that_fails_is_lost_and_says_why(model):
    async with local_cluster(model) as cluster:
        load = await opened(cluster, http_share=0.5)
        await cluster.router.stop()
        del cluster.routers[0]
        load._plan = load._plan.model_copy(update={"http_share": 0.0})
        load._asks = [ask for ask in load._asks if ask.over == "grpc"]
        streams = await ended(load, 5)
    assert {stream["outcome"] for stream in streams} == {"lost"}
    assert "UNAVAILABLE" in streams[0]["trouble"]


async def test_a_load_that_ends_by_itself_is_told(model):
    async with local_cluster(model) as cluster:
        load = await opened(cluster)
        load._asks = []  # nothing to choose from
        await load.begin()
        await until(lambda: load._arriving.done(), within_s=20)
        for look in (load.progress, load.end):
            with pytest.raises(IndexError):
                await look()
        await load._asking.close()


class Refusing:
    """A call of gRPC's that gives `tokens`, and is then refused; the next one has the answer."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.calls = 0

    def generate(self, prompt, **options):
        self.calls += 1
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def deltas(self):
        for _ in range(self._tokens):
            yield SimpleNamespace(token_ids=(1,), text="a")
        if self.calls == 1:
            raise KvrelayError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_ms=1)

    async def result(self):
        ids = (1,) * self._tokens
        return SimpleNamespace(text="", token_ids=ids, finish_reason="length", resumed=0)


ASK = Ask(0, over="grpc", chat=False, prompt="x", options={})


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_refusal_after_the_first_token_is_a_loss(tokens):
    asking = Asking([], [])
    asking._clients = [Refusing(tokens)]
    stream = Stream(0, 0, 0.0)
    asking.came = lambda stream, count: stream.came(1.0, count)
    asked = asking.ask(ASK, stream, "id", 1 << 31)
    if tokens:
        with pytest.raises(LostError, match="refused after 2 tokens"):
            await asked
    else:
        assert (await asked).finish_reason == "length"
        assert stream.refused == 1


async def test_an_answer_over_http_without_a_reason_is_not_one_that_its_client_cut():
    async def told(*given: Piece):
        for piece in given:
            yield piece

    asking = Asking([], [])
    ended = await asking._gather(told(Piece("a", "")), Stream(0, 0, 0.0), 9)
    cut = await asking._gather(told(Piece("a", ""), Piece("b", "")), Stream(0, 0, 0.0), 1)
    assert (ended.cut, cut.cut) == (False, True)
    assert difference(Answer("ab", None, "length"), ended) is not None
    assert difference(Answer("ab", None, "length"), cut) is None


async def test_blocks_that_are_not_back_are_seen_at_either_worker(model):
    async with local_cluster(model) as cluster, cluster.client() as client:
        await client.generate("a prompt", max_tokens=2).result()
        await until(cluster.all_free, within_s=2)
        for role, worker in (("prefill", cluster.prefill[0]), ("decode", cluster.decode[0])):

            async def used(within_s: float, role: str = role, worker=worker) -> int | None:
                deadline_s = time.monotonic() + within_s
                return await blocks_used(role, worker.address, worker._config, deadline_s)

            assert await used(5.0) == 0
            taken = worker.ledger.reserve("a leak", 3)
            assert await used(0.5) == 3
            worker.ledger.move("a leak", taken, BlockEvent.RELEASE)
