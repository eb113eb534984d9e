"""How the router reaches a worker: a session over gRPC, once both have proven to be members.

Called by router/fleet.py, which may be given another way: the simulation's workers are in the same
process.
"""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from kvrelay.config import RouterConfig
from kvrelay.membership import prove
from kvrelay.rpc import dial, named
from kvrelay.wire import worker_pb2_grpc


class Connect(Protocol):
    """Begins a session with the worker of `role` at `address`: commands in, events out.

    router_id: the same in all sessions of one router, so that a worker knows it again.
    Whatever keeps it from beginning raises there, whatever ends it raises where events are read.
    """

    def __call__(
        self,
        config: RouterConfig,
        role: str,
        address: str,
        commands: AsyncIterator[Any],
        router_id: str,
    ) -> AbstractAsyncContextManager[AsyncIterator[Any]]: ...


@contextlib.asynccontextmanager
async def over_grpc(
    config: RouterConfig, role: str, address: str, commands: AsyncIterator[Any], router_id: str
) -> AsyncIterator[AsyncIterator[Any]]:
    """Raises grpc.aio.AioRpcError or NotAMemberError."""
    async with dial(address, config.certificates) as channel:
        if role == "prefill":
            session = worker_pb2_grpc.PrefillWorkerStub(channel).Session
        else:
            session = worker_pb2_grpc.DecodeWorkerStub(channel).Session
        wait_s = config.worker_proof_ms / 1000
        proof = await prove(session, address, config.cluster_key, wait_s)
        call = session(commands, metadata=[*proof, named(router_id)])
        try:
            yield call
        finally:
            call.cancel()
