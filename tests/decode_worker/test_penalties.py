"""What a decode worker asks of a Reserve whose sampling penalises tokens of the prompt."""

import asyncio

import pytest
from local_cluster import local_cluster
from tiny_models import make_tiny
from waiting import until

from kvrelay.membership import prove
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2, worker_pb2_grpc


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("prompt", "answered", "why"),
    [
        ([], 0, "penalties need all 20 prompt tokens, got 0"),
        ([5] * 19, 0, "penalties need all 20 prompt tokens, got 19"),
        ([5] * 20, 21, "21 tokens answered, of 20 prompt tokens"),
    ],
)
async def test_a_prompt_that_is_not_whole_is_refused_and_nothing_is_reserved(
    model, prompt, answered, why
):
    sampling = worker_pb2.Sampling(max_tokens=4, repetition_penalty=1.5)
    reserve = worker_pb2.Reserve(
        key=7, prompt_tokens=20, sampling=sampling, prompt_token_ids=prompt, answered=answered
    )
    async with local_cluster(model) as cluster:
        service = cluster.decode[0]
        event = await first_reply(service, reserve)
        assert service.ledger.available == service.ledger.total
    assert (event.failed.key, event.failed.code) == (7, worker_pb2.FAILURE_CODE_INVALID)
    assert event.failed.message == why


async def test_without_penalties_no_prompt_is_asked_for(model):
    sampling = worker_pb2.Sampling(max_tokens=4, repetition_penalty=1.0, min_p=0.5, min_tokens=4)
    reserve = worker_pb2.Reserve(key=7, prompt_tokens=20, sampling=sampling)
    async with local_cluster(model) as cluster:
        event = await first_reply(cluster.decode[0], reserve)
        await until(cluster.all_free, within_s=60)  # it sees that the router has gone
    assert event.reserved.key == 7


async def first_reply(service, reserve):
    """The first event about a request."""

    async def commands():
        yield worker_pb2.DecodeCommand(reserve=reserve)
        await asyncio.get_running_loop().create_future()

    key = service._config.cluster_key
    async with dial(service.address) as channel, asyncio.timeout(60):
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        proof = await prove(stub.Session, service.address, key, 30)
        call = stub.Session(commands(), metadata=proof)
        async for event in call:
            if event.WhichOneof("event") in ("failed", "reserved"):
                call.cancel()
                return event
        raise AssertionError("the session ended without a reply")
