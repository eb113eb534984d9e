"""Who gets in and who does not: keys, quotas, tenants, certificates, workers and tickets, over real
sockets. In process, but over the wire alone."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import httpx2
import openai
import pytest
import pytest_asyncio
from certificates import make_certificates
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from kv_fixtures import prefill_end
from local_cluster import LocalCluster, local_cluster
from tiny_models import make_endless
from waiting import until

from kvrelay.client import AsyncClient, KvrelayError
from kvrelay.config import RouterConfig
from kvrelay.membership import prove
from kvrelay.rpc import dial
from kvrelay.transport.errors import LinkError, Rejection
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire import worker_pb2, worker_pb2_grpc
from kvrelay.wire.inference_pb2_grpc import InferenceStub
from router.fleet import Fleet
from router.keys import new_key
from router.main import SERVICE

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE_S = 60.0  # only a broken test waits this long
TEXT = "the sin of the king " * 8
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("models") / "endless")


class KeyFile:
    """A file of keys, and the keys themselves by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self._entries: dict[str, str] = {}

    def add(self, name: str, tenant: str | None = None, quota: str = "") -> None:
        self.keys[name], entry = new_key(name, tenant)
        self._entries[name] = f"{entry}{quota}\n"
        self._write()

    def remove(self, name: str) -> None:
        del self._entries[name]
        self._write()

    def _write(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(self._entries.values()))
        fresh.replace(self.path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.toml")
    file.add("alice")
    file.add("bob", "team")
    file.add("carol", "team")
    file.add("rate", quota="requests_per_minute = 1")
    file.add("one", quota="requests_at_once = 1")
    file.add("tokens", quota="tokens_per_minute = 300")
    file.add("kv", quota="kv_tokens_at_once = 300")
    return file


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model, keys) -> AsyncIterator[LocalCluster]:
    settings = {"api_keys": keys.path, "keys_check_ms": 20}
    async with local_cluster(model, router=settings) as started:
        yield started


@contextlib.asynccontextmanager
async def client(cluster: LocalCluster, **credentials: Any) -> AsyncIterator[AsyncClient]:
    async with cluster.client(timeout_s=DEADLINE_S, **credentials) as opened:
        yield opened


async def ask(cluster: LocalCluster, key: str, max_tokens: int = 4, text: str = TEXT) -> Any:
    async with client(cluster, api_key=key) as asking:
        return await asking.generate(text, max_tokens=max_tokens).result()


async def refusal(work: Any) -> KvrelayError:
    with pytest.raises(KvrelayError) as caught:
        await work
    return caught.value


# ---- keys


def every_method() -> list[str]:
    """All that the public port serves but health checks, and something that it does not serve."""
    own = pb.DESCRIPTOR.services_by_name.values()
    mirror = reflection_pb2.DESCRIPTOR.services_by_name.values()
    methods = [m for service in (*own, *mirror) for m in service.methods]
    return [f"/{m.containing_service.full_name}/{m.name}" for m in methods] + ["/no.Such/Method"]


async def test_the_methods_are_those_that_there_are():
    assert len(every_method()) >= 6
    assert f"/{SERVICE}/Tokenize" in every_method()
    assert any(reflection.SERVICE_NAME in method for method in every_method())


WRONG_KEYS = {
    "none": None,
    "empty": "",
    "no scheme": "{}",
    "another scheme": "Basic {}",
    "wrong": "Bearer {}0",
    "short": "Bearer kvr_",
    "never given": f"Bearer {new_key('alice')[0]}",
}


@pytest.mark.parametrize("header", WRONG_KEYS.values(), ids=WRONG_KEYS)
async def test_every_method_refuses_a_missing_or_wrong_key(cluster, keys, header):
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        metadata = header and [("authorization", header.format(keys.keys["alice"]))]
        for method in every_method():
            call = channel.stream_stream(method)(
                metadata=metadata
            )  # sends nothing: is not waited for
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with asyncio.timeout(DEADLINE_S):
                    await call.read()
            assert caught.value.code() is UNAUTHENTICATED, method
            assert "key" in caught.value.details()
            assert keys.keys["alice"] not in caught.value.details()


async def test_services_of_the_public_port_are_all_known_here(cluster, keys):
    """Else a new one would be missing in every_method."""
    metadata = [("authorization", f"Bearer {keys.keys['alice']}")]
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), metadata=metadata)
        listed = {s.name for s in (await call.read()).list_services_response.service}
        call.cancel()
    known = {method.split("/")[1] for method in every_method()}
    assert listed - {"grpc.health.v1.Health"} == known - {"no.Such"}


async def test_health_checks_need_no_key_and_watches_do(cluster, keys):
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="none"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        assert caught.value.code() is UNAUTHENTICATED
        metadata = [("authorization", f"Bearer {keys.keys['alice']}")]
        watch = stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert (await watch.read()).status == 1
        watch.cancel()


async def test_a_wrong_key_is_counted_once(cluster):
    def counted() -> float:
        labels = {"protocol": "grpc", "outcome": "unauthenticated"}
        registry = cluster.router.fleet.metrics._registry
        return registry.get_sample_value("kvrelay_requests_total", labels) or 0.0

    before = counted()
    async with client(cluster, api_key="wrong") as asking:
        await refusal(asking.models())
        await refusal(asking.generate("a").result())
    assert counted() == before + 2


async def test_strangers_cannot_use_up_the_calls(model, keys):
    """Neither with watches nor with checks whose message never comes."""
    limits = {"rpcs_max": 8, "health_read_ms": 50}
    async with (
        local_cluster(model, router={"api_keys": keys.path, **limits}) as cluster,
        grpc.aio.insecure_channel(cluster.router.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(8)]
        silent = [channel.stream_unary("/grpc.health.v1.Health/Check")() for _ in range(8)]
        for call in (*watches, *silent):
            async with asyncio.timeout(DEADLINE_S):
                codes = await call.code()
            assert codes in (UNAUTHENTICATED, grpc.StatusCode.DEADLINE_EXCEEDED, EXHAUSTED)
        assert (await ask(cluster, keys.keys["alice"])).completion_tokens == 4


async def test_without_keys_watches_are_limited(model):
    async with (
        local_cluster(model, router={"health_watches_max": 2}) as cluster,
        grpc.aio.insecure_channel(cluster.router.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        open_now = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in open_now:
            assert (await watch.read()).status == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        assert caught.value.code() is EXHAUSTED
        for watch in open_now:
            watch.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while cluster.router._health._watches:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_key_opens_every_method(cluster, keys):
    async with client(cluster, api_key=keys.keys["alice"]) as asking:
        assert (await asking.models())[0].name == "endless"
        assert (await asking.tokenize("hello")).token_ids
        assert (await asking.generate("hello", max_tokens=2).result()).completion_tokens == 2
        assert (await asking.chat("hello", max_tokens=2).result()).completion_tokens == 2


async def test_a_removed_key_is_refused_and_what_it_runs_goes_on(cluster, keys):
    keys.add("guest")
    async with client(cluster, api_key=keys.keys["guest"]) as asking:

        async def is_known() -> bool:
            with contextlib.suppress(KvrelayError):
                return bool(await asking.models())
            return False

        async with asyncio.timeout(DEADLINE_S):
            while not await is_known():  # noqa: ASYNC110  # no event tells it
                await asyncio.sleep(0.01)
            stream = asking.generate(TEXT, max_tokens=1000)
            await anext(stream)
            keys.remove("guest")
            while await is_known():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (await stream.result()).completion_tokens == 1000


# ---- quotas


async def test_requests_a_minute(cluster, keys):
    await ask(cluster, keys.keys["rate"])
    error = await refusal(ask(cluster, keys.keys["rate"]))
    assert error.code is EXHAUSTED
    assert "1 requests a minute, is used up; try again in" in str(error)
    async with client(cluster, api_key=keys.keys["rate"]) as asking:
        assert (await refusal(asking.tokenize("hello"))).code is EXHAUSTED


async def test_the_hint_says_when_the_quota_fills_again(cluster, keys):
    key = keys.keys["tokens"]  # 300 a minute
    await refusal(ask(cluster, key, max_tokens=1000))  # never fits; uses nothing
    metadata = [("authorization", f"Bearer {key}")]
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Generate")
        request = pb.GenerateRequest(
            text="the king", sampling=pb.SamplingParams(max_tokens=200)
        ).SerializeToString()
        async for _ in call(request, metadata=metadata):
            pass
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=metadata).read()
    hint = int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"])
    # 200 ms a token; some 205 were used of 300 and some 205 are needed.
    assert 10_000 < hint < 25_000


async def test_what_never_fits_is_invalid(cluster, keys):
    error = await refusal(ask(cluster, keys.keys["kv"], max_tokens=1000))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "ask for fewer" in str(error)


@pytest.mark.parametrize("name", ["one", "kv"])
@pytest.mark.parametrize("ending", ["cancel", "finish"])
async def test_what_runs_at_once_comes_back_however_it_ends(cluster, keys, name, ending):
    key = keys.keys[name]
    async with client(cluster, api_key=key) as asking:
        running = asking.generate("the king", max_tokens=200)
        await anext(running)
        assert (await refusal(ask(cluster, key, 200, "the king"))).code is EXHAUSTED
        if ending == "cancel":
            running.cancel()
            quotas = cluster.router._door._quotas
            await until(lambda: not quotas._accounts[name].running, within_s=DEADLINE_S)
        else:
            await running.result()
        assert (await ask(cluster, key, 200, "the king")).completion_tokens == 200


# ---- sizes


async def test_metadata_that_is_too_long_is_refused(cluster, keys):
    metadata = [
        ("authorization", f"Bearer {keys.keys['alice']}"),
        *((f"x-{number}", "x" * 1000) for number in range(10)),
    ]
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceStub(channel).ListModels(pb.ListModelsRequest(), metadata=metadata)
        assert caught.value.code() is EXHAUSTED
        await InferenceStub(channel).ListModels(pb.ListModelsRequest(), metadata=metadata[:5])


# ---- tenants


async def test_tenants_share_no_prefix(cluster, keys):
    text = "a prompt that nobody else has sent before " * 6
    first = await ask(cluster, keys.keys["bob"], text=text)
    assert first.cached_tokens == 0
    assert (await ask(cluster, keys.keys["bob"], text=text)).cached_tokens > 0
    assert (await ask(cluster, keys.keys["carol"], text=text)).cached_tokens > 0
    other = await ask(cluster, keys.keys["alice"], text=text)
    assert other.cached_tokens == 0
    assert other.token_ids == first.token_ids


@pytest.mark.slow
async def test_only_its_tenant_can_resume_an_answer(cluster, keys):
    """Bob and Carol are of one team, Alice is not."""
    metadata = {name: [("authorization", f"Bearer {key}")] for name, key in keys.keys.items()}
    sampling = pb.SamplingParams(max_tokens=100)
    request = pb.GenerateRequest(request_id="team's", text=TEXT, sampling=sampling)
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        stub = InferenceStub(channel)
        call = stub.Generate(request, metadata=metadata["bob"])
        nonce = 0
        async for event in call:
            nonce = nonce or event.accepted.nonce
            if event.delta.token_ids:
                break
        wish = pb.ResumeRequest(request_id="team's", nonce=nonce)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Resume(wish, metadata=metadata["alice"]).read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        events = [event async for event in stub.Resume(wish, metadata=metadata["carol"])]
        assert sum(len(event.delta.token_ids) for event in events) == 100
        assert await call.code() is grpc.StatusCode.ABORTED


async def test_to_look_for_an_answer_is_a_request_of_the_quota(cluster, keys):
    keys.add("looks", quota="requests_per_minute = 2")
    await until(lambda: cluster.router._callers._keys.find(keys.keys["looks"]), within_s=DEADLINE_S)
    metadata = [("authorization", f"Bearer {keys.keys['looks']}")]
    codes = []
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        for number in range(3):
            wish = pb.ResumeRequest(request_id=f"nobody-{number}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await InferenceStub(channel).Resume(wish, metadata=metadata).read()
            codes.append(caught.value.code())
    assert codes == [grpc.StatusCode.NOT_FOUND] * 2 + [EXHAUSTED]


async def test_a_tenant_cannot_tell_by_the_time_what_another_has_sent(cluster, keys):
    """Prompts that another tenant has just sent, prompts that nobody has and prompts of its own, in
    turns. Its own show that the measurement would see a cached prefix."""
    rounds, times_ms = 25, {"nobody's": [], "another's": [], "its own": []}
    for number in range(rounds):
        for kind, measured in times_ms.items():
            text = f"{number} of {kind}: " + "what nobody is to know of anybody " * 20
            if kind != "nobody's":
                by = "alice" if kind == "another's" else "bob"
                await ask(cluster, keys.keys[by], max_tokens=1, text=text)
            done = await ask(cluster, keys.keys["bob"], max_tokens=1, text=text)
            assert (done.cached_tokens > 0) == (kind == "its own")
            measured.append(done.timings.ttft_ms)
    nobodys, anothers, own = (median(measured) for measured in times_ms.values())
    print({kind: round(median(measured), 2) for kind, measured in times_ms.items()})
    assert own < 0.8 * nobodys, "a cached prefix saves too little here to be measured"
    # Much less than what a cached prefix saves.
    assert abs(anothers - nobodys) < 0.5 * (nobodys - own)


# ---- certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made = {name: make_certificates(folder / name) for name in ("cluster", "strangers")}
    made["ca alone"] = folder / "ca"
    made["ca alone"].mkdir()
    (made["ca alone"] / "ca.pem").write_bytes((made["cluster"] / "ca.pem").read_bytes())
    return made


def over_tls(model: Path, folder: Path, **router: Any) -> Any:
    return local_cluster(model, worker={"certificates": folder, "transport": "tcp"}, router=router)


async def test_with_certificates_all_is_over_tls_and_clients_show_one(model, certificates):
    own = certificates["cluster"]
    async with over_tls(model, own) as cluster:
        async with client(cluster, certificates=own) as asking:
            done = await asking.generate(TEXT, max_tokens=4).result()
            assert done.timings.transport == "tcp"
        for folder in (None, certificates["strangers"], certificates["ca alone"]):
            async with client(cluster, certificates=folder) as asking:
                assert (await refusal(asking.models())).code is grpc.StatusCode.UNAVAILABLE
        for role, address in (
            ("prefill", cluster.prefill[0].address),
            ("decode", cluster.decode[0].address),
        ):
            for folder in (None, certificates["strangers"]):
                async with dial(address, folder) as channel:
                    stub = {
                        "prefill": worker_pb2_grpc.PrefillWorkerStub,
                        "decode": worker_pb2_grpc.DecodeWorkerStub,
                    }[role](channel)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await prove(stub.Session, address, "k" * 64, DEADLINE_S)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_keys_clients_need_no_certificate(model, certificates, keys):
    own, key = certificates["cluster"], keys.keys["alice"]
    async with over_tls(model, own, api_keys=keys.path) as cluster:
        async with client(cluster, certificates=certificates["ca alone"], api_key=key) as asking:
            assert (await asking.generate(TEXT, max_tokens=4).result()).completion_tokens == 4
        async with client(cluster, certificates=own) as asking:
            assert (await refusal(asking.models())).code is UNAUTHENTICATED
        async with client(cluster, api_key=key, certificates=None) as asking:
            assert (await refusal(asking.models())).code is grpc.StatusCode.UNAVAILABLE


# ---- workers


class FakeWorker(worker_pb2_grpc.DecodeWorkerServicer):
    """Says that it is a worker, and keeps what it hears."""

    def __init__(self) -> None:
        self.address = ""
        self.info = worker_pb2.WorkerInfo()
        self.heard: list[Any] = []

    async def Session(self, commands: Any, context: Any) -> None:
        self.heard.append(context.invocation_metadata())
        await context.write(worker_pb2.DecodeEvent(info=self.info))
        async for command in commands:
            self.heard.append(command)


@contextlib.asynccontextmanager
async def fake_worker() -> AsyncIterator[FakeWorker]:
    fake = FakeWorker()
    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


async def test_a_worker_without_the_cluster_key_is_not_believed(cluster, keys, caplog):
    real, fleet = cluster.decode[0], cluster.router.fleet
    prefill = [worker.address for worker in cluster.prefill]
    async with fake_worker() as fake:
        fake.info.CopyFrom(real._engine.info("decode-fake", 256))
        fleet.set_workers(prefill, [real.address, fake.address])
        try:
            await until(
                lambda: "does not hold the cluster's key" in caplog.text, within_s=DEADLINE_S
            )
            assert fleet.connected("decode") == 1
            assert (await ask(cluster, keys.keys["alice"])).completion_tokens == 4
        finally:
            fleet.set_workers(prefill, [real.address])
    assert real._config.cluster_key not in str(fake.heard)
    assert not any(isinstance(heard, worker_pb2.DecodeCommand) for heard in fake.heard)


async def test_a_router_with_certificates_calls_no_worker_in_clear_text(
    model, certificates, tmp_path, caplog
):
    config = RouterConfig(
        model_path=model,
        model_name="endless",
        cluster_key="k" * 64,
        control_socket=tmp_path / "control.sock",
        certificates=certificates["cluster"],
    )
    fleet = Fleet(config)
    async with fake_worker() as fake:
        fleet.set_workers([], [fake.address])
        await until(lambda: f"decode {fake.address} ended" in caplog.text, within_s=DEADLINE_S)
        await fleet.close()
    assert fake.heard == []


# ---- tickets


@contextlib.asynccontextmanager
async def tickets(cluster: LocalCluster) -> AsyncIterator[Any]:
    """Gives a function that has the decode worker reserve two blocks: its ticket."""
    [worker] = cluster.decode
    commands: asyncio.Queue[Any] = asyncio.Queue()
    numbers = iter(range(1, 100))

    async def sent() -> AsyncIterator[Any]:
        while True:
            yield await commands.get()

    async with dial(worker.address) as channel, asyncio.timeout(DEADLINE_S):
        session = worker_pb2_grpc.DecodeWorkerStub(channel).Session
        key = worker._config.cluster_key
        call = session(sent(), metadata=await prove(session, worker.address, key, DEADLINE_S))

        async def ticket() -> Any:
            sampling = worker_pb2.Sampling(max_tokens=1)
            reserve = worker_pb2.Reserve(
                key=next(numbers),
                prompt_tokens=32,
                prompt_token_ids=[5] * 32,
                sampling=sampling,
            )
            commands.put_nowait(worker_pb2.DecodeCommand(reserve=reserve))
            while (event := await call.read()).WhichOneof("event") != "reserved":
                assert event.WhichOneof("event") != "failed", event
            return event.reserved.ticket

        yield ticket
        call.cancel()
    await until(cluster.all_free, within_s=DEADLINE_S)


TAMPERED = {
    "forged": lambda ticket: setattr(ticket, "signature", b"x" * 32),
    "altered": lambda ticket: ticket.block_ids.append(0),
    "later": lambda ticket: setattr(ticket, "expires_ms", 1 << 60),
}


async def test_a_worker_refuses_tickets_that_are_not_its_own(cluster):
    [worker] = cluster.decode
    rejected = worker._listener.rejected
    rejected.clear()
    async with (
        tickets(cluster) as ticket,
        prefill_end(worker._layout, name="prefill-x", transport="shm") as writers,
        prefill_end(worker._layout, name="prefill-y", transport="shm") as others,
    ):
        for tamper in TAMPERED.values():
            bad = await ticket()
            tamper(bad)
            with pytest.raises(LinkError, match="the ticket"):
                await writers.begin(bad)
        good = await ticket()
        transfer = await writers.begin(good)
        with pytest.raises(LinkError, match="has been used"):
            await others.begin(good)
        await transfer.abort("done")
    assert rejected == {Rejection.FORGED: 1, Rejection.ALTERED: 2, Rejection.REPLAYED: 1}


async def test_a_worker_refuses_a_ticket_whose_time_is_over(model):
    async with local_cluster(model, worker={"lease_ms": 1}) as cluster, tickets(cluster) as ticket:
        [worker] = cluster.decode
        async with prefill_end(worker._layout, name="prefill-x", transport="shm") as writers:
            with pytest.raises(LinkError, match="has expired"):
                await writers.begin(await ticket())
        assert worker._listener.rejected == {Rejection.EXPIRED: 1}


# ---- where it listens


async def test_a_router_does_not_open_itself_to_strangers_either(model):
    with pytest.raises(ValueError, match="strangers"):
        async with local_cluster(model, router={"host": "0.0.0.0"}):
            pass


# ---- OpenAI's API


async def test_http_with_tls_and_keys(model, certificates, keys):
    own, key = certificates["cluster"], keys.keys["alice"]
    trusting = ssl.create_default_context(cafile=certificates["ca alone"] / "ca.pem")
    strangers = ssl.create_default_context(cafile=certificates["strangers"] / "ca.pem")

    def openai_client(api_key: str, context: ssl.SSLContext) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"https://{cluster.router.http_address}/v1",
            api_key=api_key,
            max_retries=0,
            http_client=httpx2.AsyncClient(verify=context),
        )

    async with over_tls(model, own, api_keys=keys.path) as cluster:
        async with openai_client(key, trusting) as asking:
            done = await asking.completions.create(model="endless", prompt=TEXT, max_tokens=4)
            assert done.usage.completion_tokens == 4
            stream = await asking.completions.create(
                model="endless", prompt=TEXT, max_tokens=4, stream=True
            )
            assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
        async with openai_client("wrong", trusting) as asking:
            with pytest.raises(openai.AuthenticationError):
                await asking.models.list()
        async with openai_client(key, strangers) as asking:
            with pytest.raises(openai.APIConnectionError):
                await asking.models.list()
