"""A router in a process of its own, before workers of the test's: to be killed, stopped, gone on.

`python -m router` as cluster/routers.py starts it, but awaited, for tests on an event loop.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2, control_pb2_grpc

_STARTED = re.compile(r"router grpc=(?P<grpc>\S+) http=\S+")
_READY_S = 60.0
_ROOT = Path(__file__).parents[2]


class RouterProcess:
    """address: gRPC's."""

    def __init__(self, process: asyncio.subprocess.Process, config: RouterConfig) -> None:
        self.address = ""
        self._process = process
        self._config = config

    @classmethod
    async def start(cls, config: RouterConfig) -> "RouterProcess":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        router = cls(process, config)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(config.model_dump_json().encode() + b"\n")
        async with asyncio.timeout(_READY_S):
            line = (await process.stdout.readline()).decode()
        started = _STARTED.fullmatch(line.strip())
        assert started is not None, line
        router.address = started["grpc"]
        return router

    async def tell(self, prefill: list[str], decode: list[str]) -> None:
        """Returns when it is connected to all of these workers."""
        workers = control_pb2.WorkerSet(prefill_addresses=prefill, decode_addresses=decode)
        async with grpc.aio.insecure_channel(f"unix:{self._config.control_socket}") as channel:
            stub = control_pb2_grpc.RouterControlStub(channel)
            await stub.SetWorkers(workers, timeout=_READY_S, wait_for_ready=True)
            await stub.WaitReady(control_pb2.WaitReadyRequest(), timeout=_READY_S)

    def stop(self) -> None:
        """It hangs from here on."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def end(self) -> None:
        """Returns when it has ended in order."""
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_READY_S):
            assert await self._process.wait() == 0

    async def kill(self) -> None:
        """Returns when it is gone, stopped or not."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@contextlib.asynccontextmanager
async def router_process(
    config: RouterConfig, folder: Path, **settings: Any
) -> AsyncIterator[RouterProcess]:
    """One that is killed at the end. settings: what it has different from config."""
    own = {"control_socket": folder / "control.sock", "port": 0, "http_port": 0, **settings}
    router = await RouterProcess.start(config.model_copy(update=own))
    try:
        yield router
    finally:
        await router.kill()
