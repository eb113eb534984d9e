"""One serving cluster on this host: Ray with the two pools, a router process, and their end.

`kvrelay serve` and `kvrelay demo` own one Serving each. Whatever happens, `stop` leaves no process,
no shared memory and no socket: everything lives in one run folder and in processes started here.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import grpc
import psutil

from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.pools import Pools
from cluster.preparation import Progress
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.rpc import new_cluster_key
from kvrelay.wire import control_pb2, control_pb2_grpc

log = logging.getLogger(__name__)

READY_S = 30.0
_WATCH_S = 0.5
_RUN_DIR_PREFIX = "kvr-"
_OWNER_LOCK = "owner.lock"
# A unix socket's path may have 107 bytes; the run folder and Ray's names in it take some 84.
_TEMP_DIR_CHARS_MAX = 20


class Serving:
    """Call start, then watch until told to stop, then stop (in a finally)."""

    def __init__(self, model: PreparedModel, options: ServeOptions) -> None:
        self.address = ""
        self._options = options
        self._run_dir = _make_run_dir()
        cluster_key = new_cluster_key()
        self._router_config = RouterConfig(
            model_path=model.path,
            model_name=model.name,
            cluster_key=cluster_key,
            control_socket=self._run_dir / "control.sock",
            host=options.host,
            port=options.port,
            drain_ms=int(options.drain_s * 1000),
        )
        worker_config = WorkerConfig(
            model_path=model.path,
            cluster_key=cluster_key,
            socket_dir=self._run_dir,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads_each,
            block_size=options.block_size,
            kv_bytes=int(options.kv_gib * (1 << 30)),
            transport=options.transport,
            chunk_tokens=options.chunk_tokens,
        )
        sizes = {"prefill": options.prefill, "decode": options.decode}
        self._pools = Pools(worker_config, sizes, self._run_dir / "ray")
        self._router: subprocess.Popen[str] | None = None

    def start(self, report: Progress) -> None:
        """Returns when requests can be served, at `address`.

        Raises:
            ServeError: the router's port is taken, a worker cannot load the model, ...
        """
        report("starting the router", None)
        self._router = self._start_router()
        self.address = self._router_address(self._router)
        report("starting Ray", None)
        self._pools.start_ray()
        total = self._options.prefill + self._options.decode
        for loaded in self._pools.start_workers():
            report(f"loading the model into {total} workers", loaded / total)
        report("connecting router and workers", None)
        self._tell_router(wait=True)

    def watch(self, stopping: threading.Event) -> None:
        """Replaces workers that die; returns when `stopping` is set.

        Raises:
            ServeError: the router died.
        """
        assert self._router is not None, "start first"
        while not stopping.is_set():
            if self._pools.replace_dead(_WATCH_S):
                self._tell_router(wait=False)
            if self._router.poll() is not None:
                raise ServeError(f"the router ended with status {self._router.returncode}")

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Finishes running requests, at most drain_s (or until `hurry` is set), and ends all."""
        if self._router is not None:
            self._stop_router(self._router, hurry or threading.Event())
        with contextlib.suppress(Exception):
            self._pools.stop()
        _end_children()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def _start_router(self) -> "subprocess.Popen[str]":
        router = subprocess.Popen(
            [sys.executable, "-m", "router"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for us; we tell the router
        )
        assert router.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            router.stdin.write(self._router_config.model_dump_json() + "\n")
            router.stdin.flush()
        return router

    def _router_address(self, router: "subprocess.Popen[str]") -> str:
        assert router.stdout is not None
        line = router.stdout.readline()
        if not line.startswith("router grpc="):
            router.wait()
            reason = line.strip().removeprefix("failed ") or "see its traceback above"
            raise ServeError(f"the router did not start: {reason}")
        return line.strip().removeprefix("router grpc=")

    def _tell_router(self, *, wait: bool) -> None:
        workers = control_pb2.WorkerSet(
            prefill_addresses=self._pools.addresses("prefill"),
            decode_addresses=self._pools.addresses("decode"),
        )
        with grpc.insecure_channel(f"unix:{self._router_config.control_socket}") as channel:
            stub = control_pb2_grpc.RouterControlStub(channel)
            try:
                stub.SetWorkers(workers, timeout=READY_S, wait_for_ready=True)
                if wait:
                    stub.WaitReady(control_pb2.WaitReadyRequest(), timeout=READY_S)
            except grpc.RpcError as error:
                raise ServeError(f"the router does not take the workers: {error}") from error

    def _stop_router(self, router: "subprocess.Popen[str]", hurry: threading.Event) -> None:
        router.send_signal(signal.SIGTERM)
        waited_s = 0.0
        while router.poll() is None:
            if hurry.is_set() or waited_s > self._options.drain_s + READY_S:
                router.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                router.wait(timeout=0.1)
            waited_s += 0.1
        for stream in (router.stdin, router.stdout):
            if stream is not None:
                stream.close()


def _make_run_dir() -> Path:
    """A folder that belongs to this process for as long as it holds the lock in it."""
    folder = Path(tempfile.gettempdir())
    if len(str(folder)) > _TEMP_DIR_CHARS_MAX:
        folder = Path("/tmp")
    for lock in folder.glob(f"{_RUN_DIR_PREFIX}*/{_OWNER_LOCK}"):
        with contextlib.suppress(OSError):  # held: its run is alive
            os.close(_lock(lock))
            shutil.rmtree(lock.parent)  # left by a run that was killed outright
    run_dir = Path(tempfile.mkdtemp(prefix=_RUN_DIR_PREFIX, dir=folder))
    _lock(run_dir / _OWNER_LOCK)
    return run_dir


def _lock(path: Path) -> int:
    """The descriptor that holds the lock, or OSError."""
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _end_children() -> None:
    """Ray ends its processes by itself; this is for one that did not."""
    children = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        log.info("ending %d, which did not end by itself", child.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=5)
