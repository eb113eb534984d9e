"""The two pools of workers, prefill and decode: start, watch, replace, restart one by one, stop.

cluster/serving.py owns one Pools and calls `keep` again and again. Each worker is a Ray actor
(cluster/ray_worker.py); what Ray itself runs on is cluster/ray_head.py's.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cores import Slot
from cluster.options import ServeError
from cluster.place import OPEN_STATES, Place, PlaceEvent, PlaceState
from cluster.ray_head import RayHead  # before what else imports Ray: it sets what Ray reads then
from cluster.ray_worker import HANG_S, START_S, RayWorker, ready
from kvrelay.config import WorkerConfig

log = logging.getLogger(__name__)

_WAIT_S = 0.5
_STOP_S = 5.0
_DRAIN_GRACE_S = 5.0  # a worker's own word that its time to drain is over comes a little later


@dataclass(eq=False)
class _Seat:
    """A slot, and the worker that has it."""

    slot: Slot
    place: Place = field(default_factory=Place)
    worker: RayWorker | None = None


class Pools:
    """`config` is for every worker, but for its cores and what `of_role` says of its role;
    `slots` has one place for each. `drain_s` is what a worker that is restarted gets to finish
    what it runs.
    """

    def __init__(
        self,
        config: WorkerConfig,
        slots: list[Slot],
        ray_dir: Path,
        of_role: Mapping[str, Mapping[str, object]] | None = None,
        drain_s: float = 30.0,
    ) -> None:
        self.config = config
        self._seats = [_Seat(slot) for slot in slots]
        self._head = RayHead(ray_dir)
        self._of_role = of_role or {}
        self._drain_s = drain_s
        self._restarting = False
        self._to_restart: list[RayWorker] = []  # those whose turn is still to come

    def start_ray(self) -> None:
        """Raises ServeError when Ray does not start, or has not the GPUs that are needed."""
        workers = len(self._seats)
        self._head.start(self.config.threads * workers)
        gpus = self._head.gpus
        if self.config.device == "cuda" and gpus < workers:
            raise ServeError(f"--device cuda: {workers} workers need a GPU each, {gpus} found here")

    def start_workers(self) -> Iterator[int]:
        """Yields how many have started, from 0 up; raises ServeError when one cannot."""
        for seat in self._seats:
            self._launch(seat)
        yield 0
        while starting := self._in(PlaceState.STARTING):
            done = self._wait(_WAIT_S)
            for seat, worker in starting:
                if self._is_settled(seat, worker, done):
                    self._add(seat, worker)
                    yield len(self._seats) - len(self._in(PlaceState.STARTING))

    def addresses(self, role: str) -> list[str]:
        """Of the workers that requests may be placed on."""
        return [
            seat.worker.address
            for seat in self._seats
            if seat.slot.role == role and seat.worker and seat.place.state in OPEN_STATES
        ]

    def keep(self, wait_s: float) -> None:
        """Waits up to wait_s for something to happen to a worker; replaces those that died or hang,
        and takes the next step of a restart. `addresses` may be others afterwards.

        Raises:
            ServeError: Ray itself has ended.
        """
        self._head.keep()
        now_s = time.monotonic()
        for seat in self._seats:
            if seat.place.is_due(now_s):
                self._launch(seat)
        done = self._wait(wait_s)
        for seat in self._seats:
            if seat.worker is not None:
                self._look(seat, seat.worker, done)
        self._restart_next()

    def restart(self) -> None:
        """Every worker that is here now is replaced, one after another, each once it has finished
        what it runs. None begins while another one is missing."""
        log.warning("restarting the workers, one after another")
        self._restarting = True
        self._to_restart = [seat.worker for seat in self._seats if seat.worker is not None]

    def routers_know(self) -> None:
        """Every router has been told of `addresses` as they are now: nobody needs those workers
        any more that have left them."""
        for seat, worker in self._in(PlaceState.RETIRED):
            worker.begin_stop()
            seat.place.on(PlaceEvent.TOLD, time.monotonic())

    def stop(self) -> None:
        for seat, worker in self._in(PlaceState.STARTING):
            worker.kill()
            seat.worker = None
        workers = [seat.worker for seat in self._seats if seat.worker is not None]
        for worker in workers:
            if worker.stop is None:
                worker.begin_stop()
        stopping = [worker.stop for worker in workers]
        ready(stopping, _STOP_S, all_of_them=True)
        self._head.stop()

    def _in(self, state: PlaceState) -> list[tuple[_Seat, RayWorker]]:
        return [(s, s.worker) for s in self._seats if s.worker and s.place.state is state]

    def _wait(self, wait_s: float) -> set[Any]:
        refs = [ref for seat in self._seats if seat.worker for ref in seat.worker.awaited]
        if not refs:
            time.sleep(wait_s)
        return ready(refs, wait_s)

    def _launch(self, seat: _Seat) -> None:
        slot = seat.slot
        own = {"cores": slot.cores, "borrows": slot.borrows, **self._of_role.get(slot.role, {})}
        seat.worker = RayWorker(slot, self.config.model_copy(update=own))
        seat.place.on(PlaceEvent.LAUNCH, time.monotonic())

    def _look(self, seat: _Seat, worker: RayWorker, done: set[Any]) -> None:
        state, role = seat.place.state, seat.slot.role
        if state is PlaceState.STARTING:
            if self._is_settled(seat, worker, done):
                try:
                    self._add(seat, worker)
                except ServeError as error:
                    log.error("%s", error)
        elif state is PlaceState.STOPPING:
            if worker.stop in done:
                worker.dismiss()
                self._vacate(seat)
            elif time.monotonic() - seat.place.since_s > _STOP_S:
                self._end(seat, worker)
        elif worker.end in done:
            log.error("a %s worker died; it will be replaced%s", role, self._more())
            self._end(seat, worker)
        elif worker.is_hung(time.monotonic()):
            said = "a %s worker gave no sign of life for %g s; it will be replaced%s"
            log.error(said, role, HANG_S, self._more())
            self._end(seat, worker)
        elif state is PlaceState.DRAINING:
            self._look_at_drain(seat, worker, done)

    def _is_settled(self, seat: _Seat, worker: RayWorker, done: set[Any]) -> bool:
        """It has started, failed to, or used up its time."""
        now_s = time.monotonic()
        overdue = now_s - seat.place.since_s >= START_S
        return worker.start in done or worker.is_hung(now_s) or overdue

    def _add(self, seat: _Seat, worker: RayWorker) -> None:
        """Takes a start that is settled, or raises ServeError."""
        try:
            worker.started()
        except ServeError as error:
            self._end(seat, worker)
            raise ServeError(f"{error}{self._more()}") from None
        seat.place.on(PlaceEvent.STARTED, time.monotonic())

    def _end(self, seat: _Seat, worker: RayWorker) -> None:
        """The process may live, and only its loop have failed, or its end be late."""
        worker.kill()
        self._vacate(seat)

    def _vacate(self, seat: _Seat) -> None:
        seat.worker = None
        seat.place.on(PlaceEvent.ENDED, time.monotonic())

    def _restart_next(self) -> None:
        if not self._restarting or len(self._in(PlaceState.SERVING)) < len(self._seats):
            return
        while self._to_restart:
            worker = self._to_restart.pop(0)
            for seat in self._seats:
                if seat.worker is worker:  # not replaced since for another reason
                    worker.begin_drain(self._drain_s)
                    seat.place.on(PlaceEvent.DRAIN, time.monotonic())
                    return
        self._restarting = False
        log.warning("all workers have been restarted")

    def _look_at_drain(self, seat: _Seat, worker: RayWorker, done: set[Any]) -> None:
        """What still runs there when its time is over goes on elsewhere, from the token log."""
        now_s = time.monotonic()
        overdue = now_s - seat.place.since_s > self._drain_s + _DRAIN_GRACE_S
        if worker.drain in done or overdue:
            worker.drain = None
            seat.place.on(PlaceEvent.DRAINED, now_s)

    def _more(self) -> str:
        return " (--verbose shows more)" if self.config.log_level == "WARNING" else ""
