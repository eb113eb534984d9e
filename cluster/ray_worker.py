"""One worker as its supervisor has it: a Ray actor, and what is asked of it.

Made and owned by cluster/pools.py. Nothing here waits: every question is a reference of Ray's, to
be looked at when it is ready.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.actors import WorkerActor
from cluster.cores import Slot
from cluster.options import ServeError
from cluster.pulse import Pulse
from kvrelay.config import WorkerConfig

START_S = 600.0  # large models load for minutes
HANG_S = 10.0  # a worker that says nothing for longer is killed
HANG_STARTING_S = 120.0  # the system may have no time for it, and libraries take the loop


class RayWorker:
    """Starts as it is made. `config` is its own: cores and what its role has of its own."""

    def __init__(self, slot: Slot, config: WorkerConfig) -> None:
        gpus = 1 if config.device == "cuda" else 0
        options = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=config.threads, num_gpus=gpus, max_restarts=0
        )
        self.slot = slot
        self.address = ""  # once it has started
        self._actor = options.remote(slot.role, config.model_dump_json())
        self._process: psutil.Process | None = None
        self._pulse = Pulse(time.monotonic())
        # Ray's references, each ready when that has come to its end.
        self._alive = self._actor.alive.remote()
        self.start = self._actor.start.remote()
        self.end: Any = None
        self.drain: Any = None
        self.stop: Any = None

    @property
    def awaited(self) -> list[Any]:
        """The references that something is to be done about when they are ready."""
        if self.stop is not None:  # its end is a part of it
            return [self.stop]
        first = self.start if self.end is None else self.end
        return [first] if self.drain is None else [first, self.drain]

    def started(self) -> None:
        """Takes what the start came to; raises ServeError, one line, when it has failed."""
        try:
            self.address = ray.get(self.start, timeout=0)
        except RayError as error:
            raise ServeError(f"{self.slot.role} worker {self._why(error)}") from None
        self.end = self._actor.wait_for_end.remote()

    def begin_drain(self, deadline_s: float) -> None:
        """`drain` is ready when nothing runs there any more, or the deadline has passed."""
        self.drain = self._actor.drain.remote(deadline_s)

    def begin_stop(self) -> None:
        self.stop = self._actor.stop.remote()

    def is_hung(self, now_s: float) -> bool:
        """Looks for a sign of life, and asks for the next one."""
        beat = bool(ready([self._alive], 0)) and self._answered()
        self._pulse.look(now_s, beat=beat)
        return self._pulse.silent_s > (HANG_STARTING_S if self.end is None else HANG_S)

    def dismiss(self) -> None:
        """One that has stopped: Ray ends the process."""
        ray.kill(self._actor)

    def kill(self) -> None:
        """Whatever state it is in: stopped processes and blocked loops do not hear Ray."""
        ray.kill(self._actor)
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()

    def _answered(self) -> bool:
        """Takes the answer that is there, and asks again."""
        answer, self._alive = self._alive, self._actor.alive.remote()
        try:
            pid = ray.get(answer, timeout=0)
        except RayError:  # nothing to be reached there for now, or for good
            return False
        if self._process is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)
        return True

    def _why(self, error: RayError) -> str:
        if isinstance(error, RayTaskError):
            return f"cannot start: {_one_line(error.cause)}"
        if not isinstance(error, GetTimeoutError):
            return f"died while starting: {_one_line(error)}"
        if self._pulse.silent_s > HANG_STARTING_S:
            return f"gave no sign of life for {HANG_STARTING_S:g} s while starting"
        return f"did not start within {START_S:g} s"


def ready(refs: Sequence[Any], wait_s: float, *, all_of_them: bool = False) -> set[Any]:
    """Those of Ray's references that are ready, as soon as there is one, or when all are."""
    if not refs:
        return set()
    done, pending = ray.wait(refs, num_returns=len(refs) if all_of_them else 1, timeout=wait_s)
    if done and pending:  # of several it gives but as many as asked for
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
    return set(done)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
