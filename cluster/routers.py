"""The router processes of a run: their start, what they are told of workers, their end.

Owned by cluster/serving.py. Routers know nothing of one another; each has a control socket of its
own in the run's folder, and ports of its own.
"""

import contextlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from cluster.options import ServeError
from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2, control_pb2_grpc

READY_S = 30.0
_STARTED = re.compile(r"router grpc=(?P<grpc>\S+) http=(?P<http>\S+)")  # what a router says
_POLL_S = 0.1


@dataclass(frozen=True)
class RouterAddress:
    grpc: str
    http: str

    def __str__(self) -> str:
        return f"grpc={self.grpc} http={self.http}"


class Routers:
    """Call start, then tell whenever workers change, then stop, whatever start came to."""

    def __init__(self, configs: Sequence[RouterConfig], module: str) -> None:
        self.addresses: list[RouterAddress] = []  # in the order of configs
        self._configs = list(configs)
        self._module = module  # what runs as a router
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Returns when all listen.

        Raises:
            ServeError: a port is taken, a file of keys or certificates cannot be used, ...
        """
        for config in self._configs:
            self._processes.append(self._launch(config))
        self.addresses = [_address(process) for process in self._processes]

    def check(self) -> None:
        """Raises ServeError when one has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise ServeError(f"{self._one} ended with status {process.returncode}")

    def tell(
        self, workers: control_pb2.WorkerSet, timeout_s: float, *, ready_s: float = 0.0
    ) -> None:
        """Tells every router which workers there are. With ready_s, returns when all of them are
        connected to all of those.

        Raises:
            ServeError: a router could not be told; the others were.
        """
        failed: ServeError | None = None
        for config in self._configs:
            try:
                _tell(config, workers, timeout_s, ready_s)
            except grpc.RpcError as error:
                reason = " ".join(str(error.details()).split())
                failed = ServeError(f"{self._one} does not take the workers: {reason}")
        if failed is not None:
            raise failed

    def stop(self, drain_s: float, hurry: threading.Event) -> None:
        """Each finishes what it runs, at most drain_s, or until `hurry` is set."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + drain_s + READY_S
        for process in self._processes:
            _wait(process, deadline_s, hurry)

    @property
    def _one(self) -> str:
        return "the router" if len(self._configs) == 1 else "a router"

    def _launch(self, config: RouterConfig) -> "subprocess.Popen[str]":
        router = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for us; we tell the router
        )
        assert router.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            router.stdin.write(config.model_dump_json() + "\n")
            router.stdin.flush()
        return router


def _address(router: "subprocess.Popen[str]") -> RouterAddress:
    """Waits until it says where it listens."""
    assert router.stdout is not None
    if not select.select([router.stdout], [], [], READY_S)[0]:
        router.kill()
        raise ServeError(f"the router did not start within {READY_S:g} s")
    line = router.stdout.readline()
    started = _STARTED.fullmatch(line.strip())
    if started is None:
        router.wait()
        reason = line.strip().removeprefix("failed ") or "see its traceback above"
        raise ServeError(f"the router did not start: {reason}")
    return RouterAddress(started["grpc"], started["http"])


def _tell(
    config: RouterConfig, workers: control_pb2.WorkerSet, timeout_s: float, ready_s: float
) -> None:
    with grpc.insecure_channel(f"unix:{config.control_socket}") as channel:
        stub = control_pb2_grpc.RouterControlStub(channel)
        stub.SetWorkers(workers, timeout=timeout_s, wait_for_ready=True)
        if ready_s:
            stub.WaitReady(control_pb2.WaitReadyRequest(), timeout=ready_s)


def _wait(router: "subprocess.Popen[str]", deadline_s: float, hurry: threading.Event) -> None:
    """Until it has ended, which it is made to at deadline_s, or when `hurry` is set."""
    while router.poll() is None:
        if hurry.is_set() or time.monotonic() > deadline_s:
            router.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            router.wait(timeout=_POLL_S)
    for stream in (router.stdin, router.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what a router that died has not read
                stream.close()
