"""Ray's own processes on this host: their start, the loss of the head, their end.

Owned by cluster/pools.py. Ray runs on this host alone, on loopback, with a token, without dashboard
or usage report. The head (GCS, Ray's record of what there is) writes to a folder of the run: one
that is started again after a crash knows the workers that have lived on without it.
"""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Read by Ray when it is imported, so set before.
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
    # Ray's own name for "listen on loopback only".
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)

import ray
from ray.exceptions import RayError

from cluster.options import ServeError
from cluster.place import Place, PlaceEvent, PlaceState
from cluster.pulse import Pulse

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20  # the least Ray takes: nothing of ours goes through it
# Ray's processes, workers and this one among them, end themselves when the head is away for longer.
_HEADLESS_S = 86_400
_STOP_S = 20.0
_ANSWER_S = 0.5
_HANG_S = 10.0  # a head that gives no answer for longer is killed
_GCS, _RAYLET = "gcs_server", "raylet"  # as Ray names its processes
_MEMORY = Path("/dev/shm")


def storage_of(folder: Path) -> Path:
    """Where the head of the run in `folder` keeps its record. In memory, for it has to outlive
    a process and not the host, and a start would wait for a disk that is busy writing."""
    if os.access(_MEMORY, os.W_OK):
        return _MEMORY / f"{folder.parent.name}-{folder.name}-gcs"
    return folder / "gcs"


class RayHead:
    """Call start, then keep again and again, then stop. Everything of it is in `folder`, and in
    `storage_of(folder)`, both for the owner to remove."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = Place()
        self._pulse = Pulse(time.monotonic())

    def start(self, cpus: int) -> None:
        """Raises ServeError when Ray does not start."""
        # Inherited by the workers; torch makes this folder when it is imported.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder / "inductor")
        self._place.on(PlaceEvent.LAUNCH, time.monotonic())
        storage = storage_of(self._folder)
        try:
            storage.mkdir(mode=0o700, parents=True)  # no other user's, nor for others to read
            with _signals_deferred():
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says: never somebody else's cluster
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=True,  # warnings and tracebacks; Ray puts them on stderr
                    configure_logging=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(self._folder),
                    _node_ip_address="127.0.0.1",
                    _system_config={
                        "gcs_storage": "rocksdb",
                        "gcs_storage_path": str(storage),
                        "gcs_rpc_server_reconnect_timeout_s": _HEADLESS_S,
                    },
                )
        except Exception as error:  # Ray raises what it likes, Exception itself too
            reason = " ".join(str(error).split())
            raise ServeError(f"Ray did not start: {reason}") from error
        self._place.on(PlaceEvent.STARTED, time.monotonic())

    @property
    def gpus(self) -> int:
        return int(ray.cluster_resources().get("GPU", 0))

    def keep(self) -> None:
        """Starts a head that died again, with backoff. Requests need none, and workers live on; one
        that dies meanwhile is replaced when there is a head again.

        Raises:
            ServeError: the raylet has ended, and the workers with it.
        """
        if (status := _status(_RAYLET)) is not None:
            raise ServeError(f"Ray's raylet ended with status {status}, and all workers with it")
        now_s = time.monotonic()
        state = self._place.state
        if state is PlaceState.VACANT:
            if self._place.is_due(now_s):
                self._launch(now_s)
            return
        if (status := _status(_GCS)) is not None:
            log.error("Ray's head ended with status %d; it will be started again", status)
            self._place.on(PlaceEvent.ENDED, now_s)
            return
        answers = _answers()
        self._pulse.look(now_s, beat=answers)
        if self._pulse.silent_s > _HANG_S:  # it is killed as it is started again
            log.error("Ray's head gave no answer for %g s; it will be started again", _HANG_S)
            self._place.on(PlaceEvent.ENDED, now_s)
        elif state is PlaceState.STARTING and answers:
            log.warning("Ray's head is back")
            self._place.on(PlaceEvent.STARTED, now_s)

    def _launch(self, now_s: float) -> None:
        """At the same address: Ray's other processes look for it there."""
        node = ray._private.worker._global_node
        self._place.on(PlaceEvent.LAUNCH, now_s)
        self._pulse = Pulse(now_s)
        try:
            node.kill_gcs_server(check_alive=False)
            node.start_gcs_server()
        except OSError as error:
            log.error("Ray's head does not start: %s", error)
            self._place.on(PlaceEvent.ENDED, now_s)

    def stop(self) -> None:
        """Ends Ray, within _STOP_S or so: without a head its own way out may not end."""
        ending = threading.Thread(target=ray.shutdown, daemon=True)
        ending.start()
        ending.join(_STOP_S)


def _status(kind: str) -> int | None:
    """Of Ray's process of that kind, once it has ended."""
    [one] = ray._private.worker._global_node.all_processes[kind]
    return one.process.poll()


def _answers() -> bool:
    try:
        ray._private.worker.global_worker.gcs_client.check_alive([], timeout=_ANSWER_S)
    except RayError:
        return False
    return True


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Ray that is half started ends badly, so a signal is for after. Ray also puts a handler of
    its own on SIGTERM; what signals do is for the command to say."""
    arrived: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if callable(handler):  # neither ignored nor left to the system
            signal.signal(number, lambda number, frame: arrived.append(number))
    # Inherited by Ray's processes: a terminal that is closed would end them before us. Ray itself
    # does so with SIGINT.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit:  # what Ray makes of SIGTERM
        arrived.append(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for missed in arrived:
            signal.raise_signal(missed)
