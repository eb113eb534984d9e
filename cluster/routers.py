"""The router processes of a run: their start, their restart at the same ports, their end.

Owned by cluster/serving.py, which calls `keep` again and again. Routers know nothing of one
another; each has a control socket of its own in the run's folder, and ports of its own.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from cluster.options import ServeError
from cluster.place import Place, PlaceEvent, PlaceState
from cluster.router_process import HANG_S, READY_S, RouterAddress, RouterProcess
from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2

log = logging.getLogger(__name__)

_FAILED_STARTS_MAX = 5  # of one router in a row


@dataclass(eq=False)
class _Seat:
    """A router's ports, and the process that has them."""

    config: RouterConfig
    place: Place = field(default_factory=Place)
    process: RouterProcess | None = None
    address: RouterAddress | None = None  # of all processes here, once the first has started


class Routers:
    """Call start and connect, then keep, then stop, whatever start came to."""

    def __init__(self, configs: Sequence[RouterConfig], module: str) -> None:
        self._seats = [_Seat(config) for config in configs]
        self._module = module

    @property
    def addresses(self) -> list[RouterAddress]:
        """In the order of configs; they stay, whatever becomes of the processes."""
        return [seat.address for seat in self._seats if seat.address is not None]

    def start(self) -> None:
        """Returns when all listen.

        Raises:
            ServeError: a port is taken, a file of keys or certificates cannot be used, ...
        """
        for seat in self._seats:
            self._launch(seat)
        for seat, process in self._in(PlaceState.STARTING):
            address = process.started(READY_S)
            if address is None:
                raise _too_slow()
            self._serves(seat, address)

    def connect(self, workers: control_pb2.WorkerSet) -> None:
        """Returns when each is connected to all of `workers`.

        Raises:
            ServeError: one could not be told, or does not reach them.
        """
        for _, process in self._in(PlaceState.SERVING):
            try:
                process.connect(workers, READY_S)
            except grpc.RpcError as error:
                reason = " ".join(str(error.details()).split())
                raise ServeError(f"{self._one} does not take the workers: {reason}") from None

    def keep(self, workers: control_pb2.WorkerSet) -> bool:
        """Tells every router which workers there are, and starts again those that died or hang;
        waits for none. True when every one that serves is known to know.

        Raises:
            ServeError: one has failed to start _FAILED_STARTS_MAX times in a row.
        """
        for seat in self._seats:
            if seat.process is None:
                if seat.place.is_due(time.monotonic()):
                    self._launch(seat)
            elif seat.place.state is PlaceState.STARTING:
                self._look_at_start(seat, seat.process)
            else:
                self._look(seat, seat.process, workers)
        return all(process.knows(workers) for _, process in self._in(PlaceState.SERVING))

    def stop(self, drain_s: float, hurry: threading.Event) -> None:
        """Each finishes what it runs, at most drain_s, or until `hurry` is set."""
        processes = [seat.process for seat in self._seats if seat.process is not None]
        for process in processes:
            process.ask_to_end()
        deadline_s = time.monotonic() + drain_s + READY_S
        for process in processes:
            process.wait(deadline_s, hurry)

    @property
    def _one(self) -> str:
        return "the router" if len(self._seats) == 1 else "a router"

    def _in(self, state: PlaceState) -> list[tuple[_Seat, RouterProcess]]:
        return [(s, s.process) for s in self._seats if s.process and s.place.state is state]

    def _launch(self, seat: _Seat) -> None:
        seat.process = RouterProcess(seat.config, self._module)
        seat.place.on(PlaceEvent.LAUNCH, time.monotonic())

    def _serves(self, seat: _Seat, address: RouterAddress) -> None:
        seat.address = address
        seat.config = seat.config.model_copy(update=address.ports)  # those it got, if any were free
        seat.place.on(PlaceEvent.STARTED, time.monotonic())

    def _look(self, seat: _Seat, process: RouterProcess, workers: control_pb2.WorkerSet) -> None:
        if process.status is not None:
            said = "%s ended with status %d; it will be started again"
            log.error(said, self._one, process.status)
            self._end(seat, process)
            return
        process.keep_told(workers)
        if process.is_hung:
            said = "%s gave no sign of life for %g s; it will be started again"
            log.error(said, self._one, HANG_S)
            self._end(seat, process)

    def _look_at_start(self, seat: _Seat, process: RouterProcess) -> None:
        try:
            address = process.started(0.0)
            if address is None and time.monotonic() - seat.place.since_s > READY_S:
                raise _too_slow()
        except ServeError as error:
            self._end(seat, process)
            if seat.place.failed_starts >= _FAILED_STARTS_MAX:
                raise
            log.error("%s; trying again", error)
            return
        if address is not None:
            self._serves(seat, address)
            log.warning("%s serves again at %s", self._one, address)

    def _end(self, seat: _Seat, process: RouterProcess) -> None:
        process.kill()
        seat.process = None
        seat.place.on(PlaceEvent.ENDED, time.monotonic())


def _too_slow() -> ServeError:
    return ServeError(f"the router did not start within {READY_S:g} s")
