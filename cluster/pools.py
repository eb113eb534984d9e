"""The two Ray actor pools, prefill and decode: start, watch, replace, stop.

cluster/serving.py owns one Pools. Ray runs on this host alone, on loopback, with a token, without
dashboard or usage report.
"""

import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.config import WorkerConfig

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
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.actors import WorkerActor
from cluster.cores import Slot
from cluster.options import ServeError

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20  # the least Ray takes: nothing of ours goes through it
_START_S = 600.0  # large models load for minutes
_WAIT_S = 0.5
_STOP_S = 5.0
_RESTART_BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 30.0)
_STEADY_S = 60.0  # a worker that lived this long starts with no backoff again


@dataclass(eq=False)
class _Member:
    slot: Slot
    actor: Any
    address: str
    end: Any  # Ray's reference to wait_for_end
    started_s: float


@dataclass(eq=False)
class _Starting:
    """A worker that loads the model."""

    slot: Slot
    actor: Any
    address: Any  # Ray's reference to start
    failures: int  # of those it replaces, in a row
    deadline_s: float


@dataclass(eq=False)
class _Vacancy:
    """A worker that died and is to be replaced."""

    slot: Slot
    failures: int
    due_s: float


@dataclass
class Pools:
    """`config` is for every worker, but for its cores and what `of_role` says of its role;
    `slots` has one place for each.

    A slot has one owner at any time: a member, a start or a vacancy.
    """

    config: WorkerConfig
    slots: list[Slot]
    ray_dir: Path
    of_role: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    _members: list[_Member] = field(default_factory=list)
    _starting: list[_Starting] = field(default_factory=list)
    _vacancies: list[_Vacancy] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)

    def start_ray(self) -> None:
        """Raises ServeError when Ray does not start, or has not the GPUs that are needed."""
        # Inherited by the workers; torch makes this folder when it is imported.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.ray_dir / "inductor")
        workers = len(self.slots)
        try:
            with _signals_deferred():
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says: never somebody else's cluster
                    num_cpus=self.config.threads * workers,
                    include_dashboard=False,
                    log_to_driver=True,  # warnings and tracebacks; Ray puts them on stderr
                    configure_logging=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(self.ray_dir),
                    _node_ip_address="127.0.0.1",
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ServeError(f"Ray did not start: {_one_line(error)}") from error
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if self.config.device == "cuda" and gpus < workers:
            raise ServeError(f"--device cuda: {workers} workers need a GPU each, {gpus} found here")

    def start_workers(self) -> Iterator[int]:
        """Yields how many have started, from 0 up; raises ServeError when one cannot."""
        for slot in self.slots:
            self._launch(slot, failures=0)
        yield 0
        while self._starting:
            for starting in self._settled(self._wait(_WAIT_S)):
                self._add(starting)
                yield len(self.slots) - len(self._starting)

    def addresses(self, role: str) -> list[str]:
        return [member.address for member in self._members if member.slot.role == role]

    def replace_dead(self, wait_s: float) -> bool:
        """Waits up to wait_s for a death, or for a replacement to start. True if `addresses`
        changed."""
        self._fill_vacancies()
        done = self._wait(wait_s)
        before = list(self._members)
        for member in [member for member in before if member.end in done]:
            self._bury(member)
        for starting in self._settled(done):
            try:
                self._add(starting)
            except ServeError as error:
                log.error("%s", error)
                self._vacate(starting.slot, starting.failures + 1)
        return self._members != before

    def stop(self) -> None:
        for starting in self._starting:
            ray.kill(starting.actor)
        stopping = [member.actor.stop.remote() for member in self._members]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)
        ray.shutdown()

    def _wait(self, wait_s: float) -> list[Any]:
        """Ray's references of the next worker that dies or ends its start, if one does."""
        refs = [member.end for member in self._members]
        refs += [starting.address for starting in self._starting]
        if not refs:
            time.sleep(wait_s)
            return []
        done, _ = ray.wait(refs, num_returns=1, timeout=wait_s)
        return done

    def _settled(self, done: list[Any]) -> list[_Starting]:
        """Those that have started, failed to, or used up their time."""
        now = time.monotonic()
        return [s for s in self._starting if s.address in done or s.deadline_s <= now]

    def _launch(self, slot: Slot, failures: int) -> None:
        actor = self._create(slot)
        deadline_s = time.monotonic() + _START_S
        starting = _Starting(slot, actor, actor.start.remote(), failures, deadline_s)
        self._starting.append(starting)

    def _create(self, slot: Slot) -> Any:
        gpus = 1 if self.config.device == "cuda" else 0
        options = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=self.config.threads, num_gpus=gpus, max_restarts=0
        )
        own = {"cores": slot.cores, **self.of_role.get(slot.role, {})}
        config = self.config.model_copy(update=own)
        return options.remote(slot.role, config.model_dump_json())

    def _add(self, starting: _Starting) -> None:
        """Makes a settled start a member, or raises ServeError."""
        self._starting.remove(starting)
        slot, actor = starting.slot, starting.actor
        try:
            address = ray.get(starting.address, timeout=0)
        except RayError as error:
            ray.kill(actor)
            raise ServeError(f"{slot.role} worker {_why(error)}{self._more()}") from None
        end = actor.wait_for_end.remote()
        self._members.append(_Member(slot, actor, address, end, time.monotonic()))

    def _bury(self, member: _Member) -> None:
        role = member.slot.role
        log.error("a %s worker died; it will be replaced%s", role, self._more())
        self._members.remove(member)
        ray.kill(member.actor)  # in case the process lives and only its loop has failed
        lived_s = time.monotonic() - member.started_s
        failures = 0 if lived_s > _STEADY_S else self._failures.get(role, 0)
        self._vacate(member.slot, failures)

    def _vacate(self, slot: Slot, failures: int) -> None:
        self._failures[slot.role] = failures + 1
        backoff_s = _RESTART_BACKOFF_S[min(failures, len(_RESTART_BACKOFF_S) - 1)]
        self._vacancies.append(_Vacancy(slot, failures, time.monotonic() + backoff_s))

    def _fill_vacancies(self) -> None:
        for vacancy in [v for v in self._vacancies if v.due_s <= time.monotonic()]:
            self._vacancies.remove(vacancy)
            self._launch(vacancy.slot, vacancy.failures)

    def _more(self) -> str:
        return " (--verbose shows more)" if self.config.log_level == "WARNING" else ""


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


def _why(error: RayError) -> str:
    if isinstance(error, RayTaskError):
        return f"cannot start: {_one_line(error.cause)}"
    if isinstance(error, GetTimeoutError):
        return f"did not start within {_START_S:g} s"
    return f"died while starting: {_one_line(error)}"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
