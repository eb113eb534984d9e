"""A simulated router: the production's Dispatcher, in the place of whose fleet this is."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from cluster.capacity.meter import Meter
from cluster.capacity.surroundings import SimSession, Surroundings
from router.commands import (
    Command,
    DuplicateRequestError,
    Failed,
    Finished,
    OverloadError,
    ToDecode,
    ToPrefill,
)
from router.dispatcher import Dispatcher
from router.request import Request

_REAP_EVERY_S = 0.5


class SimRouter:
    """ended: called with each request when it has, and why where it has failed."""

    def __init__(
        self,
        name: str,
        around: Surroundings,
        ended: Callable[[Request, str], None],
        meter: Meter | None = None,
    ) -> None:
        self.name = name
        self.dispatcher = Dispatcher(around.router)
        self._around = around
        self._ended = ended
        self._workers: dict[str, Any] = {}  # connected
        self._sessions: dict[str, SimSession] = {}
        self._pump_s = around.router.queue_pump_ms / 1000
        self._placing = False
        self._placed_at_s = 0.0
        dispatcher = self.dispatcher
        self._submit, self._pump = dispatcher.submit, dispatcher.pump
        self._expire, self._let_go = dispatcher.expire, dispatcher.let_go
        self._on_prefill, self._on_decode = (
            dispatcher.on_prefill_event,
            dispatcher.on_decode_event,
        )
        if meter is not None:
            self._submit = meter.of("submit", self._submit)
            self._pump = meter.of("pump", self._pump)
            self._expire = meter.of("expire", self._expire)
            self._let_go = meter.of("let go", self._let_go)
            self._on_prefill = meter.of("prefill events", self._on_prefill)
            self._on_decode = meter.of("decode events", self._on_decode)
        around.timeline.call_later(_REAP_EVERY_S, self._reap)

    # ---- workers

    def connect(self, worker: Any) -> None:
        """A session to a worker that has come."""
        self._sessions[worker.name] = worker.connect(self.name)

    def lose(self, worker: Any) -> None:
        """Its session has broken."""
        self._sessions.pop(worker.name)
        if self._workers.pop(worker.name, None) is not None:
            self._carry_out(self.dispatcher.worker_down(worker.name, self._around.now_ms))

    def heard(self, worker: Any, event: Any) -> None:
        """Ignores one that is lost: its requests are elsewhere."""
        name = worker.name
        if name in self._workers:
            on_event = self._on_prefill if worker.role == "prefill" else self._on_decode
            self._carry_out(on_event(name, event, self._around.now_ms))
        elif name in self._sessions and event.HasField("info"):
            up = worker.role == "prefill"
            (self.dispatcher.prefill_up if up else self.dispatcher.decode_up)(name, event.info)
            self._workers[name] = worker
            self._place_soon()

    # ---- requests

    def submit(self, request: Request) -> None:
        try:
            commands = self._submit(request)
        except (OverloadError, DuplicateRequestError) as error:
            self._ended(request, type(error).__name__)
            return
        self._carry_out(commands)

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, (ToPrefill, ToDecode)):
                self._send(command.worker_id, command.command)
            elif isinstance(command, Finished):
                self._let_go(command.request)  # that D need not keep it: nobody here would ask
                self._ended(command.request, "")
            elif isinstance(command, Failed):
                self._ended(command.request, type(command.trouble).__name__)
        self._place_soon()

    def _send(self, worker_id: str, message: Any) -> None:
        around = self._around
        carry = partial(self._workers[worker_id].command, self._sessions[worker_id], message)
        around.timeline.put(around.timeline.now_s + around.network_s, None, carry)

    def _place_soon(self) -> None:
        """As the fleet does: once for all that happens, and not too often under load."""
        if not self._placing and self.dispatcher.to_place:
            self._placing = True
            self._around.timeline.put(self._placed_at_s + self._pump_s, None, self._place)

    def _place(self) -> None:
        self._placing, self._placed_at_s = False, self._around.timeline.now_s
        self._carry_out(self._pump(self._around.now_ms))

    def _reap(self) -> None:
        self._carry_out(self._expire(self._around.now_ms))
        self._around.timeline.call_later(_REAP_EVERY_S, self._reap)
