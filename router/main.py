"""The router process: `python -m router`, with a RouterConfig as JSON on the first line of stdin.

Started by cluster/. It serves until SIGTERM or SIGINT, or until stdin ends, which is how it learns
that whoever started it is gone; then it refuses new requests and finishes those that run.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay.config import RouterConfig
from kvrelay.rpc import make_server
from kvrelay.wire import control_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.callers import Callers
from router.control import ControlService
from router.fleet import Fleet
from router.frontdoor import FrontDoor
from router.malformed import MalformedRequests
from router.model_files import ModelFiles
from router.service import InferenceService

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_GC_NEW_OBJECTS = 20_000  # more made than freed, before it looks for cycles among the new ones
_GOODBYE_S = 0.2  # for the last status messages to leave
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Router:
    """Both servers of a router. `address` is the public one."""

    def __init__(self, config: RouterConfig, files: ModelFiles) -> None:
        self.address = ""
        self._config = config
        self.fleet = Fleet(config)
        self._door = FrontDoor(files, self.fleet, Callers())
        self._health = health.aio.HealthServicer()
        self._public = make_server(interceptors=(MalformedRequests(),), rpcs_max=config.rpcs_max)
        self._control = make_server()

    @classmethod
    async def start(cls, config: RouterConfig) -> "Router":
        """Raises ValueError for a broken model folder, RuntimeError when the port is taken."""
        files = await asyncio.to_thread(ModelFiles.load, config.model_path, config.model_name)
        router = cls(config, files)
        await router._start_public()
        control = ControlService(router.fleet, router.address)
        control_pb2_grpc.add_RouterControlServicer_to_server(control, router._control)
        router._control.add_insecure_port(f"unix:{config.control_socket}")
        await router._control.start()
        return router

    async def _start_public(self) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(
            InferenceService(self._door), self._public
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._public)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._public)
        port = self._public.add_insecure_port(f"{self._config.host}:{self._config.port}")
        self.address = f"{self._config.host}:{port}"
        await self._public.start()
        self._health_task = asyncio.create_task(self._keep_health())

    async def stop(self) -> None:
        """Finishes what runs, at most drain_ms, and closes."""
        self._health_task.cancel()
        await self._set_health(_NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_ms / 1000):
                await self._door.drain()
        # What is open now, a health watch for one, would stay open for ever.
        await self._public.stop(grace=_GOODBYE_S)
        self._door.close()
        await self.fleet.close()
        await self._control.stop(grace=None)
        self._config.control_socket.unlink(missing_ok=True)

    async def _keep_health(self) -> None:
        """SERVING for as long as both phases have a worker."""
        while True:
            change = self.fleet.next_change()
            able = self.fleet.connected("prefill") and self.fleet.connected("decode")
            await self._set_health(_SERVING if able else _NOT_SERVING)
            await change.wait()

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def serve(config: RouterConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_reader(sys.stdin.fileno(), _watch_parent, stopping)
    router = await Router.start(config)
    _tune_gc()
    print(f"router grpc={router.address}", flush=True)
    await stopping.wait()
    loop.remove_reader(sys.stdin.fileno())
    await router.stop()


def _tune_gc() -> None:
    """Keeps the garbage collector out of people's streams.

    What is loaded by now stays: to look through it again and again would stop the loop for 10 ms at
    a time. Requests are freed as they end, without the collector; it is for the rare cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_NEW_OBJECTS)


def _watch_parent(stopping: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        stopping.set()


def main() -> int:
    config = RouterConfig.model_validate_json(sys.stdin.readline())
    logging.basicConfig(level=config.log_level, format="%(levelname)s %(name)s: %(message)s")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(config))
    except (ValueError, RuntimeError, OSError, grpc.RpcError) as error:
        print(f"failed {' '.join(str(error).split())}", flush=True)  # read by whoever started it
        return 1
    return 0
