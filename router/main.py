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
import socket
import ssl
import sys
from ipaddress import ip_address

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import disable_created_metrics

from kvrelay.config import RouterConfig
from kvrelay.rpc import PUBLIC_PINGS, listen, make_server
from kvrelay.tls import server_context
from kvrelay.wire import control_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.admission import DEFAULT_LIMITS
from router.callers import Callers
from router.commands import LeavingTrouble
from router.control import ControlService
from router.exposure import bind_host, check_exposure, client_certificates_needed, listen_address
from router.fleet import Fleet
from router.frontdoor import SHUTTING_DOWN, FrontDoor
from router.guard import KeyGuard
from router.health import Health
from router.http.app import make_app
from router.http.server import HttpServer
from router.key_watch import KeyWatch
from router.malformed import MalformedRequests
from router.metrics import Metrics
from router.model_files import ModelFiles
from router.service import InferenceService
from router.template_process import TemplateLimits

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_GC_NEW_OBJECTS = 20_000  # more made than freed, before it looks for cycles among the new ones
_GOODBYE_S = 0.2  # for the last status messages to leave
# A prompt of the longest allowed, and room to say what is wrong with one that is longer.
REQUEST_BYTES_MAX = 2 * DEFAULT_LIMITS.prompt_bytes_max
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Router:
    """The servers of a router. `address` is gRPC's, `http_address` that of OpenAI's API."""

    def __init__(self, config: RouterConfig, files: ModelFiles) -> None:
        self.address = ""
        self._config = config
        self.fleet = Fleet(config, Metrics())
        self.fleet.metrics.watch(self.fleet)
        self._callers = Callers(cluster_key=config.cluster_key)
        self.key_watch: KeyWatch | None = None
        if config.api_keys is not None:
            self.key_watch = KeyWatch(config.api_keys, self._callers, config.keys_check_ms)
        limits = TemplateLimits(template_ms=config.template_ms)
        self._door = FrontDoor(files, self.fleet, self._callers, limits, config.resume_looks_max)
        self._health = Health(config.health_watches_max)
        guard = KeyGuard(self._callers, self.fleet.metrics, config.health_read_ms)
        self._public = make_server(
            interceptors=(guard, MalformedRequests()),
            rpcs_max=config.rpcs_max,
            request_bytes_max=REQUEST_BYTES_MAX,
            pings=PUBLIC_PINGS,
        )
        self._http = HttpServer(
            make_app(self._door, self.fleet.metrics, config), config, self._http_tls()
        )
        self._control = make_server()

    def _http_tls(self) -> ssl.SSLContext | None:
        """As `_start_public` has it for gRPC."""
        if self._config.certificates is None:
            return None
        asked = client_certificates_needed(api_keys=self._callers.need_keys)
        return server_context(self._config.certificates, client_certificates=asked)

    @property
    def http_address(self) -> str:
        return self._http.address

    @classmethod
    async def start(cls, config: RouterConfig) -> "Router":
        """Raises ValueError for a broken model folder, for files of keys and certificates that
        cannot be used and a host that needs them; RuntimeError or OSError when a port is
        taken."""
        host = bind_host(config.host)
        check_exposure(
            host,
            api_keys=config.api_keys is not None,
            certificates=config.certificates is not None,
            insecure=config.insecure,
        )
        config = config.model_copy(update={"host": await _address(host)})
        files = await asyncio.to_thread(ModelFiles.load, config.model_path, config.model_name)
        router = cls(config, files)
        await router._door.open()
        await router._http.start()
        await router._start_public()
        control = ControlService(router.fleet, router.address, router.http_address)
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
        config = self._config
        port = listen(
            self._public,
            listen_address(config.host, config.port),
            config.certificates,
            client_certificates=client_certificates_needed(api_keys=self._callers.need_keys),
        )
        self.address = listen_address(config.host, port)
        await self._public.start()
        self._tasks = [asyncio.create_task(self._keep_health())]
        if self.key_watch is not None:
            self._tasks.append(asyncio.create_task(self.key_watch.run()))

    async def stop(self) -> None:
        """Finishes what runs, at most drain_ms, and closes. What still runs then is a loss like any
        other: its client goes on at another router, which finds it at its workers."""
        for task in self._tasks:
            task.cancel()
        await self._set_health(_NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_ms / 1000):
                await self._door.drain()
        self.fleet.shut_down(LeavingTrouble(SHUTTING_DOWN))  # what runs is told so
        # What is open now, a health watch for one, would stay open for ever.
        await asyncio.gather(self._public.stop(grace=_GOODBYE_S), self._http.stop())
        await self._door.close()
        await self.fleet.close()
        await self._control.stop(grace=None)
        self._config.control_socket.unlink(missing_ok=True)

    async def _keep_health(self) -> None:
        """SERVING for as long as requests can be served."""
        while True:
            change = self.fleet.next_change()
            await self._set_health(_NOT_SERVING if self.fleet.not_ready else _SERVING)
            await change.wait()

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def _address(host: str) -> str:
    """What both public servers listen on; a name is looked up once, for they may differ on it."""
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"--host {host} has no address: {error.strerror}") from error
    return str(found[0][4][0])


async def serve(config: RouterConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_reader(sys.stdin.fileno(), _watch_parent, stopping)
    router = await Router.start(config)
    if router.key_watch is not None:
        loop.add_signal_handler(signal.SIGHUP, router.key_watch.look)
    _tune_gc()
    print(f"router grpc={router.address} http={router.http_address}", flush=True)
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
    disable_created_metrics()  # when a counter began is of use to nobody here
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(config))
    except (ValueError, RuntimeError, OSError, grpc.RpcError) as error:
        print(f"failed {' '.join(str(error).split())}", flush=True)  # read by whoever started it
        return 1
    return 0
