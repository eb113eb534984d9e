"""Router and worker prove to each other that they hold the cluster's key, and never show it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from kvrelay import membership
from kvrelay.membership import MembershipDoor, NotAMemberError, new_cluster_key, prove
from kvrelay.rpc import dial, listen, make_server
from kvrelay.wire import worker_pb2, worker_pb2_grpc

DEADLINE_S = 10.0  # only a broken test waits this long
KEY = "k" * 64


@dataclass
class Worker(worker_pb2_grpc.DecodeWorkerServicer):
    """Behind its door it says who it is."""

    door: MembershipDoor | None = None
    address: str = ""
    heard: list[dict[str, Any]] = field(default_factory=list)

    async def Session(self, commands: Any, context: Any) -> None:
        self.heard.append(dict(context.invocation_metadata() or ()))
        if self.door is not None:
            await self.door.admit(context)
        await self.answer(context)

    async def answer(self, context: Any) -> None:
        info = worker_pb2.WorkerInfo(instance_id="d1")
        await context.write(worker_pb2.DecodeEvent(info=info))


@contextlib.asynccontextmanager
async def serving(worker: Worker, key: str | None = KEY) -> AsyncIterator[Worker]:
    server = make_server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, server)
    worker.address = f"127.0.0.1:{listen(server, '127.0.0.1:0', None)}"
    worker.door = MembershipDoor(key, worker.address) if key else None
    await server.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield worker
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def session(address: str) -> AsyncIterator[Any]:
    async with dial(address) as channel:
        yield worker_pb2_grpc.DecodeWorkerStub(channel).Session


async def said(session: Any, proof: list[tuple[str, str]]) -> str:
    """The worker's first word; raises AioRpcError when it refuses."""
    call = session(metadata=proof)
    async for event in call:
        return event.info.instance_id
    raise AssertionError("not a word")


async def test_both_hold_the_key():
    async with serving(Worker()) as worker, session(worker.address) as ask:
        for _ in range(3):
            proof = await prove(ask, worker.address, KEY, DEADLINE_S)
            assert await said(ask, proof) == "d1"
    assert KEY not in str(worker.heard)


async def test_a_proof_is_good_once():
    async with serving(Worker()) as worker, session(worker.address) as ask:
        proof = await prove(ask, worker.address, KEY, DEADLINE_S)
        await said(ask, proof)
        with pytest.raises(grpc.aio.AioRpcError, match="proof of the cluster key is wrong"):
            await said(ask, proof)


async def test_a_worker_with_another_key_is_dropped():
    async with serving(Worker(), "x" * 64) as worker, session(worker.address) as ask:
        with pytest.raises(NotAMemberError, match="does not hold the cluster's key"):
            await prove(ask, worker.address, KEY, DEADLINE_S)


async def test_a_worker_that_lets_anybody_in_is_dropped():
    async with serving(Worker(), None) as worker, session(worker.address) as ask:
        with pytest.raises(NotAMemberError):
            await prove(ask, worker.address, KEY, DEADLINE_S)
    assert KEY not in str(worker.heard)


async def test_a_worker_that_does_not_answer_is_given_up():
    class Silent(Worker):
        async def answer(self, context: Any) -> None:
            await asyncio.get_running_loop().create_future()

    async with serving(Silent(), None) as worker, session(worker.address) as ask:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await prove(ask, worker.address, KEY, 0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_nobody_can_pass_on_what_another_worker_proves():
    """The relay answers with what a real worker said to the router's own nonce."""

    class Relay(Worker):
        async def answer(self, context: Any) -> None:
            async with session(real.address) as ask:
                call = ask(metadata=list(self.heard[-1].items()))
                await call.code()
                trailing = tuple(await call.trailing_metadata())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "prove it", trailing)

    async with serving(Worker()) as real, serving(Relay(), None) as relay:
        async with session(relay.address) as ask:
            with pytest.raises(NotAMemberError):
                await prove(ask, relay.address, KEY, DEADLINE_S)
        assert real.heard, "the relay did not ask it"


async def test_a_router_without_the_key_is_refused():
    async with serving(Worker()) as worker, session(worker.address) as ask:
        with pytest.raises(NotAMemberError):
            await prove(ask, worker.address, "x" * 64, DEADLINE_S)
        right = dict(await prove(ask, worker.address, KEY, DEADLINE_S))
        for wrong in ("", "0" * 64, right["kvrelay-challenge"]):
            with pytest.raises(grpc.aio.AioRpcError, match="cluster key"):
                await said(ask, [*(right | {"kvrelay-proof": wrong}).items()])


async def test_strangers_who_ask_for_challenges_fill_no_memory(monkeypatch):
    monkeypatch.setattr(membership, "CHALLENGES_MAX", 2)
    async with serving(Worker()) as worker, session(worker.address) as ask:
        proofs = [await prove(ask, worker.address, KEY, DEADLINE_S) for _ in range(3)]
        assert len(worker.door._challenges) == 2
        with pytest.raises(grpc.aio.AioRpcError):
            await said(ask, proofs[0])
        assert await said(ask, proofs[2]) == "d1"


def test_keys_differ():
    assert new_cluster_key() != new_cluster_key()
    assert len(new_cluster_key()) == 64
