"""One serving cluster on this host: Ray with the two pools, router processes, and their end.

`kvrelay serve` and `kvrelay demo` own one Serving each. Whatever happens, `stop` leaves no process,
no shared memory and no socket: everything lives in one run folder and in processes started here.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from pydantic import ValidationError

from cluster.cores import slots
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.pools import Pools
from cluster.preparation import Progress
from cluster.ray_head import storage_of
from cluster.routers import Routers
from kvrelay.cache import default_cache
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.membership import new_cluster_key
from kvrelay.wire import control_pb2

log = logging.getLogger(__name__)

_WATCH_S = 0.5
_END_S = 5.0
_RUN_DIR_PREFIX = "kvr-"
_OWNER_LOCK = "owner.lock"
_RAY_DIR = "ray"
# A unix socket's path may have 107 bytes; the run folder and Ray's names in it take some 84.
_TEMP_DIR_CHARS_MAX = 20


class Serving:
    """Call start, then watch until told to stop, then stop (in a finally).

    router_module: what runs as the router; a bench has one that places otherwise.
    """

    def __init__(
        self, model: PreparedModel, options: ServeOptions, *, router_module: str = "router"
    ) -> None:
        self._options = options
        self._run_dir = _temp_dir() / f"{_RUN_DIR_PREFIX}{secrets.token_hex(4)}"
        try:
            router_configs, worker_config = _configs(model, options, self._run_dir)
        except ValidationError as error:
            wrong = (f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
            raise ServeError("; ".join(wrong)) from None
        except (OverflowError, ValueError) as error:  # infinities and NaN have no int
            raise ServeError(f"kv_gib or drain_s: {error}") from None
        decode = {"kv_dtype": options.decode_kv_dtype} if options.decode_kv_dtype else {}
        ray_dir = self._run_dir / _RAY_DIR
        self._pools = Pools(
            worker_config, slots(options), ray_dir, {"decode": decode}, options.drain_s
        )
        self.routers = Routers(router_configs, router_module)
        self._restart_asked = threading.Event()

    @property
    def address(self) -> str:
        """gRPC's, at the first router."""
        return self.routers.addresses[0].grpc

    @property
    def http_address(self) -> str:
        """That of OpenAI's API, at the first router."""
        return self.routers.addresses[0].http

    @property
    def worker_config(self) -> WorkerConfig:
        """Every worker's, but for its cores and what its role has of its own."""
        return self._pools.config

    def worker_addresses(self, role: str) -> list[str]:
        """Those of `role` that serve now."""
        return self._pools.addresses(role)

    def start(self, report: Progress) -> None:
        """Returns when requests can be served, at each of `routers.addresses`.

        Raises:
            ServeError: a router's port is taken, a worker cannot load the model, ...
        """
        _remove_abandoned(self._run_dir.parent)
        _make_run_dir(self._run_dir)
        report("starting the router", None)
        self.routers.start()
        report("starting Ray", None)
        self._pools.start_ray()
        total = self._options.prefill + self._options.decode
        for loaded in self._pools.start_workers():
            report(f"loading the model into {total} workers", loaded / total)
        report("connecting router and workers", None)
        self.routers.connect(self._workers())

    def watch(self, stopping: threading.Event) -> None:
        """Replaces workers and routers that die or hang; returns when `stopping` is set.

        Raises:
            ServeError: a router does not start again, or Ray has ended.
        """
        while not stopping.is_set():
            if self._restart_asked.is_set():
                self._restart_asked.clear()
                self._pools.restart()
            self._pools.keep(_WATCH_S)
            if self.routers.keep(self._workers()):
                self._pools.routers_know()

    def restart_workers(self) -> None:
        """Has `watch` restart every worker, one after another, with nothing lost. Returns at once;
        for any thread, and for a signal's handler."""
        self._restart_asked.set()

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Finishes running requests, at most drain_s (or until `hurry` is set), and ends all."""
        self.routers.stop(self._options.drain_s, hurry or threading.Event())
        # Now, while the workers that Ray may leave behind are still below us.
        processes = set(psutil.Process().children(recursive=True))
        with contextlib.suppress(Exception):
            self._pools.stop()
        _end(processes | set(psutil.Process().children(recursive=True)))
        _remove(self._run_dir)

    def _workers(self) -> control_pb2.WorkerSet:
        return control_pb2.WorkerSet(
            prefill_addresses=self._pools.addresses("prefill"),
            decode_addresses=self._pools.addresses("decode"),
        )


def _configs(
    model: PreparedModel, options: ServeOptions, run_dir: Path
) -> tuple[list[RouterConfig], WorkerConfig]:
    cluster_key = new_cluster_key()
    certificates = options.certificates.absolute() if options.certificates else None
    first = RouterConfig(
        model_path=model.path,
        model_name=model.name,
        cluster_key=cluster_key,
        log_level=options.log_level,
        control_socket=run_dir / "control.sock",
        host=options.host,
        port=options.port,
        http_port=options.http_port,
        drain_ms=int(options.drain_s * 1000),
        local_prefill=options.local_prefill,
        ttft_target_ms=options.ttft_target_ms,
        tpot_target_ms=options.tpot_target_ms,
        api_keys=options.api_keys.absolute() if options.api_keys else None,
        certificates=certificates,
        insecure=options.insecure,
    )
    routers = [first, *(_further(first, number) for number in range(1, options.routers))]
    worker = WorkerConfig(
        model_path=model.path,
        cluster_key=cluster_key,
        log_level=options.log_level,
        socket_dir=run_dir,
        dtype=options.dtype,
        device=options.device,
        quantize=options.quantize,
        kv_dtype=options.kv_dtype,
        cache_dir=default_cache(),
        threads=options.threads_each,
        block_size=options.block_size,
        kv_bytes=int(options.kv_gib * (1 << 30)),
        transport=options.transport,
        wire_codec=options.wire_codec,
        checksums=options.checksums,
        certificates=certificates,
        prefix_caching=options.prefix_caching,
        chunk_tokens=options.chunk_tokens,
        itl_target_ms=options.itl_target_ms,
        tpot_target_ms=options.tpot_target_ms,
    )
    return routers, worker


def _further(first: RouterConfig, number: int) -> RouterConfig:
    """The config of router `number`, counted from 0: next ports, a control socket of its own."""
    own = {
        "control_socket": first.control_socket.with_name(f"control-{number}.sock"),
        "port": first.port and first.port + number,  # 0: any free one, for each
        "http_port": first.http_port and first.http_port + number,
    }
    return first.model_copy(update=own)


def _temp_dir() -> Path:
    folder = Path(tempfile.gettempdir())
    return folder if len(str(folder)) <= _TEMP_DIR_CHARS_MAX else Path("/tmp")


def _remove_abandoned(folder: Path) -> None:
    """Removes what runs that were killed outright have left."""
    for lock in folder.glob(f"{_RUN_DIR_PREFIX}*/{_OWNER_LOCK}"):
        with contextlib.suppress(OSError):  # held: its run is alive
            os.close(_lock(lock))
            _remove(lock.parent)


def _remove(run_dir: Path) -> None:
    for folder in (storage_of(run_dir / _RAY_DIR), run_dir):
        shutil.rmtree(folder, ignore_errors=True)


def _make_run_dir(run_dir: Path) -> None:
    """A folder that belongs to this process for as long as it holds the lock in it.

    It gets its name when the lock is held: another start never sees it without.
    """
    unnamed = run_dir.with_name(f"new-{run_dir.name}")
    try:
        unnamed.mkdir(mode=0o700)
        _lock(unnamed / _OWNER_LOCK)
        unnamed.rename(run_dir)
    except OSError as error:
        raise ServeError(f"no folder for this run: {error}") from error
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)


def _lock(path: Path) -> int:
    """The descriptor that holds the lock, or OSError."""
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _end(processes: Iterable[psutil.Process]) -> None:
    """Ray ends its processes by itself; this is for one that did not."""
    for process in _wait_for_end(processes):
        log.info("ending %d, which did not end by itself", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for_end(processes)


def _wait_for_end(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are alive after _END_S. A zombie is not: it may be for others to reap."""
    deadline_s = time.monotonic() + _END_S
    alive = [process for process in processes if _is_alive(process)]
    while alive and time.monotonic() < deadline_s:
        time.sleep(0.05)
        alive = [process for process in alive if _is_alive(process)]
    return alive


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
