"""What clients can get wrong, on the wire itself: each mistake gets its status and a message that
names the field, and a stream that runs beside it gets exactly the tokens it would have had."""

import asyncio
import contextlib
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from local_cluster import LocalCluster, local_cluster
from tiny_models import make_endless

from kvrelay.wire import control_pb2, control_pb2_grpc, worker_pb2_grpc
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL_TOKENS = 4096
VOCAB_SIZE = 281
# Only a broken test waits this long.
DEADLINE_S = 60.0
BYSTANDER_TOKENS = 2000
# Decoded after the mistake was refused: enough for its traces to show.
AFTER_TOKENS = 12
OPEN_SIZES = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
BLOCK_SIZE = 16

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("models") / "endless")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model):
    async with local_cluster(model) as started:
        yield started
        await blocks_back(started)


async def blocks_back(cluster: LocalCluster) -> None:
    """A cancelled request's blocks come back when the workers have heard of it."""
    async with asyncio.timeout(DEADLINE_S):
        while not cluster.all_free():  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def channel_to(cluster: LocalCluster):
    async with grpc.aio.insecure_channel(cluster.router.address, options=OPEN_SIZES) as channel:
        yield channel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(cluster):
    async with channel_to(cluster) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel) -> InferenceStub:
    return InferenceStub(channel)


def generate(text: str = "hello", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


def sampled(**params: Any) -> pb.GenerateRequest:
    return generate(sampling=pb.SamplingParams(**params))


def chat(*messages: tuple[str, str], **fields: Any) -> pb.ChatRequest:
    wire = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.ChatRequest(messages=wire, **fields)


BYSTANDER = generate(
    "once upon a time",
    sampling=pb.SamplingParams(max_tokens=BYSTANDER_TOKENS, temperature=1.0, seed=11),
)


class Tokens:
    """Reads a stream: `ids` so far; `more` returns when so many others have come."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.ids: list[int] = []
        self.finished: pb.Finished | None = None
        self._events = aiter(call)

    async def more(self, count: int) -> None:
        target = len(self.ids) + count
        async with asyncio.timeout(DEADLINE_S):
            while len(self.ids) < target and self.finished is None:
                self._take(await anext(self._events))

    async def all(self) -> list[int]:
        async with asyncio.timeout(DEADLINE_S):
            async for event in self._events:
                self._take(event)
        assert self.finished is not None
        return self.ids

    def _take(self, event: pb.GenerateResponse) -> None:
        self.ids += event.delta.token_ids
        if event.HasField("finished"):
            self.finished = event.finished


async def tokens_of(call: Any) -> list[int]:
    return await Tokens(call).all()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(stub):
    """The bystander's tokens when it is alone."""
    ids = await tokens_of(stub.Generate(BYSTANDER))
    assert len(ids) == BYSTANDER_TOKENS
    return ids


@pytest_asyncio.fixture(loop_scope="module")
async def bystander(cluster, stub, undisturbed):
    """A stream that has begun, and is looked at again when the test is done."""
    stream = Tokens(stub.Generate(BYSTANDER))
    await stream.more(1)
    yield
    await stream.more(AFTER_TOKENS)
    assert stream.finished is None, "it ended before the mistake was dealt with"
    stream.call.cancel()
    await blocks_back(cluster)
    assert stream.ids == undisturbed[: len(stream.ids)]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that is refused before it is accepted."""
    first = anext(aiter(call)) if hasattr(call, "__aiter__") else call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(first, DEADLINE_S)
    details = caught.value.details()
    assert details
    assert "Traceback" not in details
    return caught.value


async def assert_refused(call: Any, code: grpc.StatusCode, *words: str) -> None:
    error = await refused(call)
    assert error.code() is code, error.details()
    assert [word for word in words if word not in error.details()] == [], error.details()


# ---- fields


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (generate(""), ["text: empty", "at least one character"]),
        (pb.GenerateRequest(), ["text: empty"]),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), ["token_ids: empty", "at least one"]),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 9, VOCAB_SIZE])),
            ["token_ids[2]: 281", "0 to 280"],
        ),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), ["token_ids[0]: 4294967295"]),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * MODEL_TOKENS)),
            ["prompt: 4096 tokens leave no room", "may have 4096"],
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * (4 << 20))),
            ["4194304", "4096"],
        ),
        (generate("x" * 20_000), ["prompt: 20000 tokens", "may have 4096"]),
        (generate("x" * 100_000), ["text: 100000 bytes are more than 4096 tokens"]),
        (
            sampled(max_tokens=MODEL_TOKENS),
            ["max_tokens: 4096 and 3 prompt tokens", "4096, the limit", "1 to 4093"],
        ),
        (sampled(max_tokens=2**31 - 1), ["max_tokens: 2147483647", "1 to 4093"]),
        (sampled(max_tokens=0), ["max_tokens: 0", "1 to 4093"]),
        (sampled(max_tokens=-1), ["max_tokens: -1", "1 to 4093"]),
        (sampled(max_tokens=-(2**31)), ["max_tokens: -2147483648", "1 to 4093"]),
        (sampled(temperature=-1), ["temperature: -1.0", "0 to 2"]),
        (sampled(temperature=3), ["temperature: 3.0", "0 to 2"]),
        (sampled(temperature=math.nan), ["temperature: nan", "0 to 2"]),
        (sampled(temperature=math.inf), ["temperature: inf", "0 to 2"]),
        (sampled(temperature=-math.inf), ["temperature: -inf", "0 to 2"]),
        (sampled(top_p=0), ["top_p: 0.0", "over 0 up to 1"]),
        (sampled(top_p=1.5), ["top_p: 1.5", "over 0 up to 1"]),
        (sampled(top_p=math.nan), ["top_p: nan", "over 0 up to 1"]),
        (sampled(top_p=-0.5), ["top_p: -0.5", "over 0 up to 1"]),
        (sampled(top_k=-1), ["top_k: -1", "0 (keep all) and more"]),
        (sampled(min_p=-0.5), ["min_p: -0.5", "0 to 1"]),
        (sampled(min_p=math.nan), ["min_p: nan", "0 to 1"]),
        (sampled(repetition_penalty=0), ["repetition_penalty: 0.0", "over 0"]),
        (sampled(repetition_penalty=math.inf), ["repetition_penalty: inf", "over 0"]),
        (sampled(presence_penalty=2.5), ["presence_penalty: 2.5", "-2 to 2"]),
        (sampled(frequency_penalty=-3), ["frequency_penalty: -3.0", "-2 to 2"]),
        (sampled(min_tokens=-1), ["min_tokens: -1", "0 to 256"]),
        (sampled(min_tokens=9, max_tokens=8), ["min_tokens: 9", "0 to 8, which is max_tokens"]),
        (sampled(stop_token_ids=[1] * 65), ["stop_token_ids: 65 tokens", "at most 64"]),
        (sampled(stop_token_ids=[0, VOCAB_SIZE]), ["stop_token_ids[1]: 281", "0 to 280"]),
        (sampled(stop_token_ids=[2**32 - 1]), ["stop_token_ids[0]: 4294967295"]),
        (sampled(stop=["x"] * 17), ["stop: 17 strings", "at most 16"]),
        (sampled(stop=["x"] * 100_000), ["stop: 100000 strings", "at most 16"]),
        (sampled(stop=["fine", ""]), ["stop[1]: empty", "at least one character"]),
        (sampled(stop=["x" * 257]), ["stop[0]: 257 bytes", "at most 256"]),
        (sampled(stop=["x" * (1 << 20)]), ["stop[0]: 1048576 bytes", "at most 256"]),
        (generate(request_id="x" * 129), ["request_id: 129 bytes", "at most 128"]),
        (generate(request_id="x" * 500_000), ["request_id: 500000 bytes", "at most 128"]),
        (generate(request_id="é"), ["request_id: ", "printable ASCII"]),
        (generate(request_id="a b"), ["request_id: ", "printable ASCII"]),
        (generate(request_id="a\r\nb"), ["request_id: ", "printable ASCII"]),
        (generate(request_id="a\0b"), ["request_id: ", "printable ASCII"]),
        (generate("x" * (6 << 20)), ["text: 6291456 bytes", "at most 4194304"]),
    ],
    ids=lambda value: value[0][:40].replace("\x00", "") if isinstance(value, list) else "",
)
async def test_field_of_generate(stub, bystander, request_, words):
    await assert_refused(stub.Generate(request_), INVALID, *words)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (chat(), ["messages: empty", "at least one message"]),
        (chat(("", "hi")), ["messages[0].role: empty", "'user'"]),
        (chat(("user", ""), ("user", "")), ["messages: every content is empty"]),
        (chat(*[("user", "hi")] * 10_000), ["messages: 10000", "at most 1024"]),
        (chat(("user", "hi"), ("pirate", "ahoy")), ["only user, assistant and system roles"]),
        (chat(("user", "x" * (6 << 20))), ["messages: 6291460 bytes", "at most 4194304"]),
        (chat(("user", "x" * 20_000)), ["prompt: 200", "may have 4096"]),
        (chat(("user", "hi"), sampling=pb.SamplingParams(top_k=-1)), ["top_k: -1"]),
        (chat(("user", "hi"), request_id="é"), ["request_id: "]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
async def test_field_of_chat(stub, bystander, request_, words):
    await assert_refused(stub.Chat(request_), INVALID, *words)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.TokenizeRequest(), ["text: empty"]),
        (pb.TokenizeRequest(text="x" * (6 << 20)), ["text: 6291456 bytes", "at most 4194304"]),
    ],
    ids=["empty", "6 MB"],
)
async def test_field_of_tokenize(stub, bystander, request_, words):
    await assert_refused(stub.Tokenize(request_), INVALID, *words)


async def test_unknown_model(stub, bystander):
    words = ("'gpt-17' is not served", "'endless' is")
    for call in (
        stub.Generate(generate(model="gpt-17")),
        stub.Chat(chat(("user", "hi"), model="gpt-17")),
        stub.Tokenize(pb.TokenizeRequest(text="hi", model="gpt-17")),
    ):
        await assert_refused(call, grpc.StatusCode.NOT_FOUND, *words)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 2.0, "top_k": 2**31 - 1, "top_p": 1.0, "seed": 2**64 - 1},
        {"temperature": 1.0, "top_p": 5e-324, "seed": 0},
        {"temperature": 0.0, "top_k": 1, "top_p": 0.1},
        {"stop": ["x" * 256, *(f"never said {n}" for n in range(15))]},
        {"min_p": 1.0, "repetition_penalty": 5e-324, "temperature": 1.0},
        {"repetition_penalty": 1.7e308, "presence_penalty": -2, "frequency_penalty": 2},
        {"stop_token_ids": range(64), "min_tokens": 8, "ignore_eos": True},
    ],
    ids=["most", "least top_p", "greedy", "stop", "min_p", "penalties", "stop tokens"],
)
async def test_the_ends_of_what_is_allowed_are_allowed(stub, bystander, params):
    ids = await tokens_of(stub.Generate(sampled(max_tokens=8, **params)))
    assert len(ids) == 8


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
async def test_the_least_temperature_is_as_good_as_greedy(stub, bystander, temperature):
    greedy = await tokens_of(stub.Generate(sampled(max_tokens=8)))
    ids = await tokens_of(
        stub.Generate(sampled(max_tokens=8, temperature=temperature, seed=2**64 - 1))
    )
    assert ids == greedy


async def test_the_longest_prompt_and_answer_are_allowed(stub, bystander):
    longest = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[7] * (MODEL_TOKENS - 1)), request_id="x" * 128
    )
    assert len(await tokens_of(stub.Generate(longest))) == 1


async def test_max_tokens_unset_ends_where_the_model_ends(stub, bystander):
    nearly = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * (MODEL_TOKENS - 5)))
    assert len(await tokens_of(stub.Generate(nearly))) == 5


# ---- bytes that are no message


def raw(channel: Any, method: str, data: bytes) -> Any:
    kind = channel.unary_unary if method in ("Tokenize", "ListModels") else channel.unary_stream
    call = kind(
        f"/kvrelay.v1.Inference/{method}",
        request_serializer=lambda same: same,
        response_deserializer=lambda same: same,
    )
    return call(data)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("Generate", b"\x1a\x02\xff\xfe"),  # text: two bytes that are not UTF-8
        ("Generate", b"\x1a\x03\xed\xa0\x80"),  # text: half of a surrogate pair
        ("Generate", b"\x0a\x01\xff\x1a\x02hi"),  # request_id
        ("Generate", b"\x2a\x03\x32\x01\xff\x1a\x02hi"),  # sampling.stop
        ("Generate", b"\x1a\x7fhi"),  # text: shorter than it says
        ("Generate", b"\xff" * 64),
        ("Generate", b"GET / HTTP/1.1\r\n\r\n"),
        ("Chat", b"\x1a\x04\x0a\x02\xff\xfe"),  # messages[0].role
        ("Chat", b"\xff" * 64),
        ("Tokenize", b"\x12\x02\xff\xfe"),
        ("ListModels", b"\xff" * 64),
    ],
)
async def test_bytes_that_are_no_message(channel, bystander, method, data):
    words = ("not a valid protobuf message", "UTF-8")
    await assert_refused(raw(channel, method, data), INVALID, *words)


async def test_millions_of_fields_are_refused_without_reading_them(channel, bystander):
    await assert_refused(raw(channel, "Chat", b"\x1a\x00" * (4 << 20)), INVALID, "12000 fields")


async def test_a_message_over_the_size_limit(stub, bystander):
    call = stub.Generate(generate("x" * (40 << 20)))
    await assert_refused(call, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", "8388608")


async def test_a_method_that_is_not_there(channel, bystander):
    error = await refused(raw(channel, "Teleport", b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_not_http2(cluster, bystander):
    host, port = cluster.router.address.rsplit(":", 1)
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(500), b"\0" * 65536):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                while await reader.read(4096):
                    pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# ---- request ids


async def test_a_request_id_that_is_running(stub, cluster, bystander):
    request = generate(request_id="mine", sampling=pb.SamplingParams(max_tokens=200))
    expected = await tokens_of(stub.Generate(request))
    first = Tokens(stub.Generate(request))
    await first.more(1)
    for call in (
        stub.Generate(request),
        stub.Chat(chat(("user", "hi"), request_id="mine")),
    ):
        await assert_refused(call, grpc.StatusCode.ALREADY_EXISTS, "request id 'mine'", "running")
    assert first.finished is None
    assert await first.all() == expected
    assert await tokens_of(stub.Generate(request)) == expected, "free again once it has ended"


async def test_a_request_id_is_free_again_after_a_cancel(stub, cluster, bystander):
    request = generate(request_id="gone", sampling=pb.SamplingParams(max_tokens=1000))
    first = Tokens(stub.Generate(request))
    await first.more(1)
    first.call.cancel()
    async with asyncio.timeout(DEADLINE_S):
        # The bystander stays.
        while len(cluster.router.fleet.dispatcher) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    request.sampling.max_tokens = 3
    assert len(await tokens_of(stub.Generate(request))) == 3


# ---- chat templates


async def test_a_model_without_chat_template(tmp_path):
    model = make_endless(tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    async with local_cluster(model) as cluster, channel_to(cluster) as channel:
        stub = InferenceStub(channel)
        words = ("'plain' has no chat template", "Generate")
        call = stub.Chat(chat(("user", "hi")))
        await assert_refused(call, grpc.StatusCode.FAILED_PRECONDITION, *words)
        [listed] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert not listed.has_chat_template
        assert len(await tokens_of(stub.Generate(sampled(max_tokens=4)))) == 4


# ---- a pool that is small


def pool_of(cluster_blocks: int) -> dict[str, Any]:
    """Worker settings for so many blocks of the tiny llama."""
    layers, kv_heads, head_dim, float_bytes = 3, 2, 16, 4
    block_bytes = layers * 2 * BLOCK_SIZE * kv_heads * head_dim * float_bytes
    return {"kv_bytes": cluster_blocks * block_bytes, "block_size": BLOCK_SIZE}


async def test_longer_than_the_whole_pool(model):
    async with local_cluster(model, worker=pool_of(4)) as cluster, channel_to(cluster) as channel:
        stub = InferenceStub(channel)
        beside = Tokens(stub.Generate(sampled(max_tokens=20)))
        await beside.more(1)
        [listed] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert listed.max_model_tokens == 64
        prompt = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 65))
        await assert_refused(stub.Generate(prompt), INVALID, "prompt: 65 tokens", "may have 64")
        words = ("max_tokens: 62 and 3 prompt tokens", "1 to 61")
        await assert_refused(stub.Generate(sampled(max_tokens=62)), INVALID, *words)
        assert len(await beside.all()) == 20
        assert len(await tokens_of(stub.Generate(sampled(max_tokens=61)))) == 61


async def test_a_full_queue(model):
    """One request fills the pool, two wait, the fourth is told to come back."""
    settings = {"worker": pool_of(24), "router": {"queue_max": 2}}
    whole_pool = sampled(max_tokens=380)
    async with local_cluster(model, **settings) as cluster, channel_to(cluster) as channel:
        stub = InferenceStub(channel)
        expected = await tokens_of(stub.Generate(whole_pool))
        running = Tokens(stub.Generate(whole_pool))
        await running.more(1)
        waiting = [Tokens(stub.Generate(whole_pool)) for _ in range(2)]
        accepted = [await anext(aiter(stream.call)) for stream in waiting]
        assert all(event.HasField("accepted") for event in accepted)

        error = await refused(stub.Generate(sampled(max_tokens=1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 requests are waiting" in error.details()
        hints = dict(error.trailing_metadata() or ())
        assert hints["grpc-retry-pushback-ms"] == "1000"
        # A mistake is told as one, full or not.
        await assert_refused(stub.Generate(sampled(top_k=-1)), INVALID, "top_k")

        assert running.finished is None
        assert await running.all() == expected
        assert [await stream.all() for stream in waiting] == [expected, expected]


async def test_more_calls_at_once_than_are_allowed(model):
    async with (
        local_cluster(model, router={"rpcs_max": 1}) as cluster,
        channel_to(cluster) as channel,
    ):
        stub = InferenceStub(channel)
        running = Tokens(stub.Generate(sampled(max_tokens=1000)))
        await running.more(1)
        error = await refused(stub.Generate(sampled(max_tokens=1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert running.finished is None
        assert len(await running.all()) == 1000


async def test_a_wait_that_takes_too_long(model):
    settings = {"worker": pool_of(64), "router": {"queue_wait_ms": 100}}
    async with local_cluster(model, **settings) as cluster, channel_to(cluster) as channel:
        stub = InferenceStub(channel)
        running = Tokens(stub.Generate(sampled(max_tokens=1000)))
        await running.more(1)
        late = Tokens(stub.Generate(sampled(max_tokens=1000)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late.all()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no worker had room" in caught.value.details()
        assert dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "1000"
        assert running.finished is None
        assert len(await running.all()) == 1000


# ---- doors that are not the client's


@pytest.mark.parametrize("key", [None, "", "wrong", "x" * 65])
@pytest.mark.parametrize("headers", [["kvrelay-nonce"], ["kvrelay-challenge", "kvrelay-proof"]])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_asks_for_the_cluster_key(cluster, bystander, role, headers, key):
    [worker] = getattr(cluster, role)
    metadata = None if key is None else [(header, key) for header in headers]
    kind = {
        "prefill": worker_pb2_grpc.PrefillWorkerStub,
        "decode": worker_pb2_grpc.DecodeWorkerStub,
    }[role]
    async with grpc.aio.insecure_channel(worker.address) as channel:
        call = kind(channel).Session(metadata=metadata)
        await assert_refused(call, grpc.StatusCode.UNAUTHENTICATED, "cluster key")


async def test_the_control_service_is_not_on_the_public_port(channel, cluster, bystander):
    control = control_pb2_grpc.RouterControlStub(channel)
    for call in (
        control.SetWorkers(control_pb2.WorkerSet()),
        control.WaitReady(control_pb2.WaitReadyRequest()),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.UNIMPLEMENTED
