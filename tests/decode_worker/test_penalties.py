"""What a decode worker asks of a Reserve: the whole prompt, which penalties need, and whoever goes
on with the answer."""

import asyncio

import pytest
from local_cluster import local_cluster
from tiny_models import make_tiny

from kvrelay.membership import prove
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2, worker_pb2_grpc


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("prompt", "answered", "why"),
    [
        ([], 0, "0 tokens sent of a prompt of 20"),
        ([5] * 19, 0, "19 tokens sent of a prompt of 20"),
        ([5] * 20, 21, "21 tokens answered, of 20 prompt tokens"),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
async def test_a_prompt_that_is_not_whole_is_refused_and_nothing_is_reserved(
    model, prompt, answered, why, penalty
):
    sampling = worker_pb2.Sampling(max_tokens=4, repetition_penalty=penalty)
    reserve = worker_pb2.Reserve(
        key=7, prompt_tokens=20, sampling=sampling, prompt_token_ids=prompt, answered=answered
    )
    async with local_cluster(model) as cluster:
        service = cluster.decode[0]
        event = await first_reply(service, reserve)
        assert service.ledger.available == service.ledger.total
    assert (event.failed.key, event.failed.code) == (7, worker_pb2.FAILURE_CODE_INVALID)
    assert event.failed.message == why


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
