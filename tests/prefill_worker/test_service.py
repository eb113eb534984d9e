"""What a prefill worker refuses by itself, before any compute is spent."""

import asyncio

from local_cluster import local_cluster
from router_double import session_with
from tiny_models import make_tiny

from kvrelay.membership import prove
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2, worker_pb2_grpc


async def test_a_ticket_for_another_layout_is_refused_with_both_sides_named(tmp_path):
    async with local_cluster(make_tiny("llama", tmp_path / "llama")) as cluster:
        service = cluster.prefill[0]
        prefill = worker_pb2.Prefill(key=7, prompt_token_ids=[5] * 20)
        prefill.ticket.layout.CopyFrom(service._layout.to_wire())
        prefill.ticket.layout.block_size = 32
        prefill.ticket.block_ids.extend([0, 1])
        failed = await first_failure(service, worker_pb2.PrefillCommand(prefill=prefill))
    assert (failed.key, failed.code) == (7, worker_pb2.FAILURE_CODE_INVALID)
    assert "block_size: 16 here, 32 there" in failed.message


async def test_names_that_are_not_the_prompts_are_refused(tmp_path):
    async with local_cluster(make_tiny("llama", tmp_path / "llama")) as cluster:
        service = cluster.prefill[0]
        for hashes, why in ((b"x" * 17, "17 bytes"), (b"x" * 32, "2 block hashes for 1 full")):
            prefill = worker_pb2.Prefill(key=7, prompt_token_ids=[5] * 20, block_hashes=hashes)
            prefill.ticket.layout.CopyFrom(service._layout.to_wire())
            prefill.ticket.block_ids.extend([0, 1])
            failed = await first_failure(service, worker_pb2.PrefillCommand(prefill=prefill))
            assert (failed.key, failed.code) == (7, worker_pb2.FAILURE_CODE_INVALID)
            assert why in failed.message


async def test_more_answered_than_the_prompt_has_is_refused(tmp_path):
    async with local_cluster(make_tiny("llama", tmp_path / "llama")) as cluster:
        service = cluster.prefill[0]
        prefill = worker_pb2.Prefill(key=7, prompt_token_ids=[5] * 20, answered=21)
        prefill.sampling.frequency_penalty = 0.5
        prefill.ticket.layout.CopyFrom(service._layout.to_wire())
        prefill.ticket.block_ids.extend([0, 1])
        failed = await first_failure(service, worker_pb2.PrefillCommand(prefill=prefill))
    assert (failed.key, failed.code) == (7, worker_pb2.FAILURE_CODE_INVALID)
    assert failed.message == "21 tokens answered, of 20 prompt tokens"


async def test_a_prefill_worker_says_what_its_steps_cost(tmp_path):
    model = make_tiny("llama", tmp_path / "llama")
    async with local_cluster(model) as cluster, cluster.client() as client:
        async with session_with(cluster.prefill[0]) as session:
            await session.until(lambda: bool(session.events))
            assert session.events[0].load.cost == worker_pb2.StepCost()
            assert session.events[0].info.chunk_tokens == cluster.prefill[0]._config.chunk_tokens
        for token in (5, 6, 7):
            await client.generate([token] * 300, max_tokens=2).result()
        async with session_with(cluster.prefill[0]) as session:
            await session.until(lambda: bool(session.events))
            assert session.events[0].load.cost.ms_per_prompt_token > 0


async def first_failure(service, command):
    async def commands():
        yield command
        await asyncio.get_running_loop().create_future()

    key = service._config.cluster_key
    async with dial(service.address) as channel, asyncio.timeout(30):
        stub = worker_pb2_grpc.PrefillWorkerStub(channel)
        proof = await prove(stub.Session, service.address, key, 30)
        call = stub.Session(commands(), metadata=proof)
        async for event in call:
            if event.WhichOneof("event") == "failed":
                call.cancel()
                return event.failed
        raise AssertionError("the session ended without a refusal")
