"""The router's core: what happens, in; what is to be done, out. Queue, placement, token logs.

A pure object: the service tells it what happened and carries out the commands it returns. It has
no clock, no socket and no task, so it can be driven by tests and by a simulator as it is.
"""

from collections.abc import Sequence

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode
from router.adoption import Adoptions
from router.attempts import Attempts
from router.commands import (
    Command,
    Deliver,
    DuplicateRequestError,
    QueueFullError,
    prefill,
    resync_decode,
    resync_prefill,
)
from router.forecast import check_deadline
from router.placing import Placing
from router.queue import WaitingQueue
from router.recovery import Recovery
from router.request import ENDINGS, Request, RequestEvent, RequestState, TokenMismatchError
from router.requests import Requests
from router.resumption import Resumption
from router.strikes import Strikes
from router.workers import Workers

_NO_ROOM = FailureCode.FAILURE_CODE_EXHAUSTED


class Dispatcher:
    """Events only note what has changed; who waits is placed by `pump`, to be called soon after
    any of them for as long as `to_place` says so, and once for many events."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._queue = WaitingQueue(config)
        self._workers = Workers(config)
        self._attempts = Attempts(self._workers)
        self._requests = Requests(self._queue, self._workers, self._attempts)
        self._strikes = Strikes(config)
        self._recovery = Recovery(
            config, self._requests, self._queue, self._workers, self._attempts, self._strikes
        )
        self._placing = Placing(
            config,
            self._queue,
            self._workers,
            self._attempts,
            self._requests,
            self._strikes,
            self._recovery,
        )
        self._adoptions = Adoptions(config, self._requests, self._workers, self._attempts)

    # ---- what clients do

    def submit(self, request: Request) -> list[Command]:
        """Places it at once where nobody waits.

        Raises DuplicateRequestError, QueueFullError or DeadlineError, and changes nothing then.
        """
        now_ms = request.times.arrived_at_ms
        if request in self._requests:
            raise DuplicateRequestError(f"request id {request.request_id!r} is running already")
        if self._queue.full:
            raise QueueFullError(f"{len(self._queue)} requests are waiting", self._queue.all_ms())
        request.number = self._requests.next_number
        if request.ttft_deadline_ms:
            check_deadline(request, self._queue, self._workers)
        self._requests.add(request)
        request.queued_at_ms = now_ms
        self._queue.push(request)
        return self.pump(now_ms) if len(self._queue) == 1 else []

    def let_go(self, request: Request) -> list[Command]:
        """The client has all it wants, or is gone. Nothing more is delivered.

        Changes nothing for a request that has failed or was never accepted.
        """
        if not self._requests.has(request):
            return self._attempts.acknowledge(request)
        commands = self._attempts.withdraw(request)
        self._requests.end(request, RequestEvent.CANCEL)
        return commands

    def resume(self, wish: Resumption) -> list[Command]:
        """Looks for a request whose client has lost its router. A Resumed or a NotKept comes of
        it, now or later, unless it is withdrawn."""
        return self._adoptions.resume(wish)

    def withdraw(self, wish: Resumption) -> None:
        """Its client is gone."""
        self._adoptions.withdraw(wish)

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and answer that the connected workers can hold; None without workers."""
        return self._workers.context_tokens

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    @property
    def workers(self) -> Workers:
        """For looking at."""
        return self._workers

    def __len__(self) -> int:
        return len(self._requests)

    # ---- what workers do

    def prefill_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        self._workers.prefill_up(worker_id, info)
        self._recovery.worker_up(worker_id)

    def decode_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        self._workers.decode_up(worker_id, info)
        self._recovery.worker_up(worker_id)

    def worker_down(self, worker_id: str, now_ms: float, *, died: bool = True) -> list[Command]:
        """Every request that needs this worker is placed again.

        died: False where it was taken away, or may be lost by the router's own doing.
        """
        died = died and not self._workers.drains(worker_id)
        self._workers.down(worker_id)
        self._placing.keep_no_longer(worker_id, now_ms)
        adoptions = self._adoptions.worker_down(worker_id)
        return adoptions + self._recovery.worker_down(worker_id, now_ms, died=died)

    def _drains(self, worker_id: str, now_ms: float) -> None:
        self._placing.keep_no_longer(worker_id, now_ms)
        self._recovery.worker_drains(worker_id)

    def on_prefill_event(
        self, worker_id: str, event: worker_pb2.PrefillEvent, now_ms: float
    ) -> list[Command]:
        self._placing.pass_time(now_ms)
        refused = event.failed.code == _NO_ROOM
        if self._workers.prefill_load(worker_id, event.load, refused=refused):
            self._drains(worker_id, now_ms)
        commands: list[Command] = []
        if event.HasField("blocks") and not self._workers.blocks_changed(worker_id, event.blocks):
            commands.append(resync_prefill(worker_id))
        kind = event.WhichOneof("event")
        request = self._attempts.get(getattr(event, kind).key) if kind else None
        if request is not None:
            if kind == "started":
                request.times.note_start(event.started, now_ms)
            elif kind == "first_token":
                request.times.note_computed(event.first_token)
                commands += self._tokens(request, 0, [event.first_token.token_id], now_ms)
            elif kind == "handed_off":
                request.times.note_hand_off(event.handed_off)
                self._workers.claims.handed_off(request.key, event.handed_off.kv_exposed_ms)
                commands += self._requests.handed_off(request)
            elif kind == "failed" and request.state is RequestState.DECODING:
                # The decode worker has it all the same.
                commands += self._requests.handed_off(request)
            elif kind == "failed":
                commands += self._recovery.failed(request, worker_id, event.failed, now_ms)
        return commands

    def on_decode_event(
        self, worker_id: str, event: worker_pb2.DecodeEvent, now_ms: float
    ) -> list[Command]:
        self._placing.pass_time(now_ms)
        refused = event.failed.code == _NO_ROOM
        if self._workers.decode_load(worker_id, event.load, refused=refused):
            self._drains(worker_id, now_ms)
        commands: list[Command] = []
        if event.HasField("blocks") and not self._workers.blocks_changed(worker_id, event.blocks):
            commands.append(resync_decode(worker_id))
        kind = event.WhichOneof("event")
        if kind == "step":
            for output in event.step.outputs:
                commands += self._output(output, now_ms)
        elif kind == "adopted":
            commands += self._adoptions.adopted(worker_id, event.adopted, now_ms)
        elif kind and (request := self._attempts.get(getattr(event, kind).key)):
            if kind == "reserved":
                commands += self._reserved(request, event.reserved)
            elif kind == "started":
                request.times.note_start(event.started, now_ms)
            elif kind == "first_token":
                request.times.note_computed_here(event.first_token)
                commands += self._tokens(request, 0, [event.first_token.token_id], now_ms)
            elif kind == "failed":
                commands += self._recovery.failed(request, worker_id, event.failed, now_ms)
        elif kind == "failed":
            commands += self._adoptions.refused(event.failed)
        return commands

    def expire(self, now_ms: float) -> list[Command]:
        """Ends the waits whose time is up; called about once a second."""
        self._workers.forget_refusals()
        self._workers.fade(now_ms)
        self._workers.forgive(now_ms)
        commands = self._recovery.expire(now_ms) + self._adoptions.expire(now_ms)
        self._workers.stir()
        return commands

    # ---- steps of one request

    @property
    def to_place(self) -> bool:
        """Whether `pump` may find a place for somebody who waits."""
        return self._placing.to_place

    def pump(self, now_ms: float) -> list[Command]:
        """Places a few of those who wait, as far as there is room."""
        return self._placing.pump(now_ms)

    def _reserved(self, request: Request, reserved: worker_pb2.Reserved) -> list[Command]:
        if request.state is not RequestState.RESERVING:
            return []
        request.on(RequestEvent.RESERVED)
        self._workers.claims.reserved(request.key, reserved.ticket.first_block)
        return [] if request.prefill_here else [prefill(request, reserved.ticket)]

    def _output(self, output: worker_pb2.SequenceOutput, now_ms: float) -> list[Command]:
        request = self._attempts.get(output.key)
        if request is None:
            return []
        if request.state is RequestState.PREFILLING:
            request.on(RequestEvent.ACCEPTED)
        commands = self._tokens(request, output.offset, output.token_ids, now_ms)
        if output.ending != worker_pb2.ENDING_NONE and request.state is RequestState.DECODING:
            request.ending = ENDINGS[output.ending]
            commands += self._requests.finish_if_complete(request)
        return commands

    def _tokens(
        self, request: Request, offset: int, tokens: Sequence[int], now_ms: float
    ) -> list[Command]:
        try:
            if request.state is RequestState.RESERVING:
                raise TokenMismatchError(f"tokens {list(tokens)} before Reserved")
            new = request.log(offset, tokens, now_ms)
        except TokenMismatchError as error:
            return self._recovery.retry(request, RequestEvent.FAILED, str(error), now_ms)
        if not new:
            return []
        self._workers.claims.computed(request.key)
        return [Deliver(request, len(request.answer) - len(new), new)]

    def check(self) -> None:
        """Asserts that everything that is kept is what its requests make of it. For tests."""
        self._attempts.check()
        self._requests.check()
        self._adoptions.check()
