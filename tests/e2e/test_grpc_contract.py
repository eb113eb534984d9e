"""What a gRPC client may count on that was written without us: health, reflection, and the one
.proto file. In process, but over the wire alone."""

import asyncio
import json
import sys
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from local_cluster import local_cluster
from tiny_models import make_endless

from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROTO = Path(__file__).parents[2] / "proto" / "inference.proto"
SERVICE = "kvrelay.v1.Inference"
# Only a broken test waits this long.
DEADLINE_S = 60.0
TEXT = "the sin of the king"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    model = make_endless(tmp_path_factory.mktemp("models") / "endless")
    async with local_cluster(model) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(cluster):
    async with grpc.aio.insecure_channel(cluster.router.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel) -> InferenceStub:
    return InferenceStub(channel)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answer(stub) -> list[int]:
    """What every client must get for TEXT, 8 tokens, greedy."""
    request = pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(max_tokens=8))
    events = [event async for event in stub.Generate(request)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    deltas = [event.delta for event in events[1:-1]]
    ids: list[int] = []
    for delta in deltas:
        assert not delta.token_ids or delta.offset == len(ids)
        ids += delta.token_ids
    assert len(ids) == events[-1].finished.completion_tokens == 8
    return ids


# ---- the service itself


async def test_tokenize_and_generate_agree_on_the_prompt(stub, answer):
    tokens = await stub.Tokenize(pb.TokenizeRequest(text=TEXT))
    assert len(tokens.token_ids) == len(tokens.tokens) > 0
    assert "".join(tokens.tokens).replace("Ġ", " ") == TEXT
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=tokens.token_ids), sampling=pb.SamplingParams(max_tokens=8)
    )
    events = [event async for event in stub.Generate(request)]
    assert events[0].accepted.prompt_tokens == len(tokens.token_ids)
    assert [id for event in events for id in event.delta.token_ids] == answer


async def test_list_models(stub):
    [model] = (await stub.ListModels(pb.ListModelsRequest())).models
    assert model == pb.Model(
        name="endless", max_model_tokens=4096, vocab_size=281, has_chat_template=True
    )


async def test_a_seed_that_was_drawn_gives_the_same_answer_again(stub):
    params = pb.SamplingParams(max_tokens=8, temperature=1.0)
    first = [event async for event in stub.Generate(pb.GenerateRequest(text=TEXT, sampling=params))]
    params.seed = first[0].accepted.seed
    again = [event async for event in stub.Generate(pb.GenerateRequest(text=TEXT, sampling=params))]
    ids = [[id for event in events for id in event.delta.token_ids] for events in (first, again)]
    assert ids[0] == ids[1]


# ---- health


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_check(channel, name):
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_of_a_service_that_is_not_there(channel):
    health = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_watch(channel, name):
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
    async with asyncio.timeout(DEADLINE_S):
        status = (await anext(aiter(call))).status
    call.cancel()
    assert status == health_pb2.HealthCheckResponse.SERVING


async def test_a_watch_sees_the_end_and_does_not_put_it_off(tmp_path):
    """Load balancers watch for as long as they live; nothing runs, so the end comes at once."""
    model = make_endless(tmp_path / "endless")
    async with (
        local_cluster(model, router={"drain_ms": 600_000}) as cluster,
        grpc.aio.insecure_channel(cluster.router.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        async with asyncio.timeout(20):
            assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(cluster.router.stop())
            assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await stopping


# ---- clients made without our code


def _ask_by_reflection(address: str) -> tuple[set[str], list[int]]:
    """All that it knows of the messages came from the server. Blocks."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE).FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        assert method.server_streaming
        assert not method.client_streaming
        call = channel.unary_stream(
            f"/{SERVICE}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = request_class(text=TEXT, sampling={"max_tokens": 8})
        ids = [id for event in call(request, timeout=DEADLINE_S) for id in event.delta.token_ids]
    return services, ids


async def test_a_client_that_has_only_reflection(cluster, answer):
    services, ids = await asyncio.to_thread(_ask_by_reflection, cluster.router.address)
    assert {SERVICE, "grpc.health.v1.Health"} <= services
    assert not [name for name in services if "internal" in name]
    assert ids == answer


STRANGERS_CLIENT = """\
import json, sys

import grpc
import inference_pb2 as pb
from inference_pb2_grpc import InferenceStub

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = InferenceStub(channel)
    ids = []
    request = pb.GenerateRequest(text=sys.argv[2], sampling=pb.SamplingParams(max_tokens=8))
    for event in stub.Generate(request, timeout=60):
        ids += event.delta.token_ids
    finished = event.finished
    messages = [pb.ChatMessage(role="user", content="hi")]
    chat = pb.ChatRequest(messages=messages, sampling=pb.SamplingParams(max_tokens=3))
    *_, last = stub.Chat(chat, timeout=60)
    [model] = stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    print(json.dumps({
        "ids": ids,
        "reason": pb.FinishReason.Name(finished.reason),
        "transport": finished.timings.transport,
        "chat_tokens": last.finished.completion_tokens,
        "model": model.name,
        "ours": [name for name in sys.modules if name.split(".")[0] == "kvrelay"],
    }))
"""


async def _run(*command: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_a_client_generated_from_the_proto_file_alone(cluster, answer, tmp_path):
    (tmp_path / PROTO.name).write_bytes(PROTO.read_bytes())
    # In processes of their own: two descriptions of one package do not fit into one.
    protoc = (sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.")
    await _run(*protoc, "--grpc_python_out=.", PROTO.name, cwd=tmp_path)
    (tmp_path / "client.py").write_text(STRANGERS_CLIENT)
    printed = await _run(sys.executable, "client.py", cluster.router.address, TEXT, cwd=tmp_path)
    assert json.loads(printed) == {
        "ids": answer,
        "reason": "FINISH_REASON_LENGTH",
        "transport": "shm",
        "chat_tokens": 3,
        "model": "endless",
        "ours": [],
    }
