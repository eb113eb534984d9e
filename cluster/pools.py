"""The two Ray actor pools, prefill and decode: start, watch, replace, stop.

cluster/serving.py owns one Pools. Ray runs on this host alone, on loopback, with a token, without
dashboard or usage report.
"""

import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator
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
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.actors import WorkerActor
from cluster.options import ServeError

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20  # the least Ray takes: nothing of ours goes through it
_START_S = 600.0  # large models load for minutes
_STOP_S = 5.0
_RESTART_BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 30.0)
_STEADY_S = 60.0  # a worker that lived this long starts with no backoff again


@dataclass(eq=False)
class _Member:
    role: str
    actor: Any
    address: str
    end: Any  # Ray's reference to wait_for_end
    started_s: float


@dataclass(eq=False)
class _Vacancy:
    """A worker that died and is to be replaced."""

    role: str
    failures: int
    due_s: float


@dataclass
class Pools:
    """`config` is for every worker; `sizes` gives the number of each role."""

    config: WorkerConfig
    sizes: dict[str, int]
    ray_dir: Path
    _members: list[_Member] = field(default_factory=list)
    _vacancies: list[_Vacancy] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)

    def start_ray(self) -> None:
        """Raises ServeError when Ray does not start, or has not the GPUs that are needed."""
        # Ray puts handlers of its own on these signals; what they do is for the command to say.
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        # Inherited by the workers; torch makes this folder when it is imported.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.ray_dir / "inductor")
        workers = sum(self.sizes.values())
        try:
            ray.init(
                num_cpus=self.config.threads * workers,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(self.ray_dir),
                _node_ip_address="127.0.0.1",
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ServeError(f"Ray did not start: {_one_line(error)}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if self.config.device == "cuda" and gpus < workers:
            raise ServeError(f"--device cuda: {workers} workers need a GPU each, {gpus} found here")

    def start_workers(self) -> Iterator[int]:
        """Yields how many have started, from 0 up; raises ServeError when one cannot."""
        roles = [role for role, size in self.sizes.items() for _ in range(size)]
        actors = [(role, self._create(role)) for role in roles]
        starting = [(role, actor, actor.start.remote()) for role, actor in actors]
        yield 0
        for count, (role, actor, address) in enumerate(starting, start=1):
            self._add(role, actor, address)
            yield count

    def addresses(self, role: str) -> list[str]:
        return [member.address for member in self._members if member.role == role]

    def replace_dead(self, wait_s: float) -> bool:
        """Waits up to wait_s for a death or a replacement that is due. True if anything changed."""
        changed = self._fill_vacancies()
        refs = [member.end for member in self._members]
        if changed or not refs:
            time.sleep(0 if changed else wait_s)
            return changed
        ended, _ = ray.wait(refs, num_returns=1, timeout=wait_s)
        for member in [m for m in self._members if m.end in ended]:
            log.error("a %s worker died; it will be replaced", member.role)
            self._members.remove(member)
            ray.kill(member.actor)  # in case the process lives and only its loop has failed
            lived_s = time.monotonic() - member.started_s
            failures = 0 if lived_s > _STEADY_S else self._failures.get(member.role, 0)
            self._vacate(member.role, failures)
        return bool(ended)

    def stop(self) -> None:
        stopping = [member.actor.stop.remote() for member in self._members]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)
        ray.shutdown()

    def _create(self, role: str) -> Any:
        gpus = 1 if self.config.device == "cuda" else 0
        options = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=self.config.threads, num_gpus=gpus, max_restarts=0
        )
        return options.remote(role, self.config.model_dump_json())

    def _add(self, role: str, actor: Any, address: Any) -> None:
        try:
            where = ray.get(address, timeout=_START_S)
            member = _Member(role, actor, where, None, time.monotonic())
        except RayTaskError as error:
            raise ServeError(f"{role} worker: {_one_line(error.cause)}") from None
        except GetTimeoutError:
            ray.kill(actor)
            raise ServeError(f"{role} worker did not start within {_START_S:g} s") from None
        except RayActorError as error:
            raise ServeError(f"{role} worker died while starting: {_one_line(error)}") from None
        member.end = actor.wait_for_end.remote()
        self._members.append(member)

    def _vacate(self, role: str, failures: int) -> None:
        self._failures[role] = failures + 1
        backoff_s = _RESTART_BACKOFF_S[min(failures, len(_RESTART_BACKOFF_S) - 1)]
        self._vacancies.append(_Vacancy(role, failures, time.monotonic() + backoff_s))

    def _fill_vacancies(self) -> bool:
        due = [v for v in self._vacancies if v.due_s <= time.monotonic()]
        for vacancy in due:
            self._vacancies.remove(vacancy)
            actor = self._create(vacancy.role)
            try:
                self._add(vacancy.role, actor, actor.start.remote())
            except ServeError as error:
                log.error("%s", error)
                self._vacate(vacancy.role, vacancy.failures + 1)
        return bool(due)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
