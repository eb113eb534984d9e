"""A peer that hangs is found by pings that it does not answer; one that only pings is left alone.

The peer is a process of its own, stopped with SIGSTOP: the kernel still acknowledges packets.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvrelay.rpc import PUBLIC_PINGS, SESSION_PINGS, dial, listen, make_server
from kvrelay.wire import worker_pb2, worker_pb2_grpc

DEADLINE_S = 30.0  # only a broken test waits this long
FOUND_S = (SESSION_PINGS.every_ms + SESSION_PINGS.answer_ms) / 1000

_WORKER = """
import asyncio
from kvrelay.rpc import listen, make_server
from kvrelay.wire import worker_pb2, worker_pb2_grpc

class Worker(worker_pb2_grpc.DecodeWorkerServicer):
    async def Session(self, commands, context):
        await context.write(worker_pb2.DecodeEvent())
        await asyncio.Event().wait()

async def main():
    server = make_server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(Worker(), server)
    port = listen(server, "127.0.0.1:0", None)
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

_ROUTER = """
import asyncio, sys
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2_grpc

async def main():
    async with dial(sys.argv[1]) as channel:
        async for _ in worker_pb2_grpc.DecodeWorkerStub(channel).Session(forever()):
            print("connected", flush=True)

async def forever():
    await asyncio.Event().wait()
    yield

asyncio.run(main())
"""


class Worker(worker_pb2_grpc.DecodeWorkerServicer):
    """Says one thing, and notes when its session ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Session(self, commands: Any, context: Any) -> None:
        try:
            await context.write(worker_pb2.DecodeEvent())
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def serving(server: grpc.aio.Server, worker: Worker) -> AsyncIterator[str]:
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, server)
    address = f"127.0.0.1:{listen(server, '127.0.0.1:0', None)}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def process(code: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield child
    finally:
        child.kill()
        await child.wait()


async def line_of(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    return (await child.stdout.readline()).decode().strip()


async def test_a_worker_that_hangs_ends_the_routers_call():
    async with (
        asyncio.timeout(DEADLINE_S),
        process(_WORKER) as child,
        dial(f"127.0.0.1:{await line_of(child)}") as channel,
    ):
        call = worker_pb2_grpc.DecodeWorkerStub(channel).Session()
        assert await call.read() == worker_pb2.DecodeEvent()
        os.kill(child.pid, signal.SIGSTOP)
        since = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - since < FOUND_S + 5


async def test_a_router_that_hangs_ends_the_workers_session():
    worker = Worker()
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(make_server(), worker) as address,
        process(_ROUTER, address) as child,
    ):
        assert await line_of(child) == "connected"
        os.kill(child.pid, signal.SIGSTOP)
        since = time.monotonic()
        await worker.ended.wait()
        assert time.monotonic() - since < FOUND_S + 5


async def test_a_client_of_the_public_port_may_ping_each_second():
    """So that it finds a router that hangs, while its request waits and nothing is said."""
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(make_server(pings=PUBLIC_PINGS), Worker()) as address,
        dial(address) as channel,
    ):
        call = worker_pb2_grpc.DecodeWorkerStub(channel).Session()
        await call.read()
        reading = asyncio.create_task(call.read())
        done, _ = await asyncio.wait([reading], timeout=5 * SESSION_PINGS.every_ms / 1000)
        assert not done, "three pings too many would have ended it"
        reading.cancel()
