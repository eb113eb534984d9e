"""The router's core: queue, placement, token logs, retries.

A pure object: the service tells it what happened and carries out the commands it returns. It has
no clock, no socket and no task, so it can be driven by tests and by a simulator as it is.
"""

from collections import deque
from collections.abc import Sequence

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode
from router.commands import (
    Command,
    Deliver,
    DuplicateRequestError,
    ExhaustedTrouble,
    Failed,
    Finished,
    InvalidTrouble,
    QueueFullError,
    Trouble,
    UnavailableTrouble,
    cancel_decode,
    cancel_prefill,
    prefill,
    reserve,
)
from router.policy import Placement, place
from router.request import Ending, Request, RequestEvent, RequestState, TokenMismatchError
from router.workers import Workers

_NO_ROOM = FailureCode.FAILURE_CODE_EXHAUSTED


class Dispatcher:
    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._queue: deque[Request] = deque()
        self._requests: dict[str, Request] = {}
        self._by_key: dict[int, Request] = {}
        self._next_key = 1
        self._workers = Workers()

    # ---- what clients do

    def submit(self, request: Request) -> list[Command]:
        """Raises DuplicateRequestError or QueueFullError and changes nothing."""
        if request.request_id in self._requests:
            raise DuplicateRequestError(f"request id {request.request_id!r} is running already")
        if len(self._queue) >= self._config.queue_max:
            raise QueueFullError(f"{len(self._queue)} requests are waiting")
        self._requests[request.request_id] = request
        request.queued_at_ms = request.times.arrived_at_ms
        self._queue.append(request)
        return self._pump(request.times.arrived_at_ms)

    def let_go(self, request: Request, now_ms: float) -> list[Command]:
        """The client has all it wants, or is gone. Nothing more is delivered.

        Changes nothing for a request that has ended or was never accepted.
        """
        if self._requests.get(request.request_id) is not request:
            return []
        commands = self._withdraw(request)
        self._end(request)
        return commands + self._pump(now_ms)

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

    def prefill_up(self, worker_id: str, info: worker_pb2.WorkerInfo, now: float) -> list[Command]:
        self._workers.prefill_up(worker_id, info)
        return self._pump(now)

    def decode_up(self, worker_id: str, info: worker_pb2.WorkerInfo, now: float) -> list[Command]:
        self._workers.decode_up(worker_id, info)
        return self._pump(now)

    def worker_down(self, worker_id: str, now_ms: float) -> list[Command]:
        """Every request that needs this worker is placed again."""
        self._workers.down(worker_id)
        commands: list[Command] = []
        # The newest first: each goes to the head of the queue, so they keep their order.
        for request in sorted(self._by_key.values(), key=lambda r: r.key, reverse=True):
            if request.decode_id == worker_id:
                commands += self._lost(request, worker_id, "decode", now_ms)
            elif request.prefill_id == worker_id and request.state is RequestState.DECODING:
                commands += self._handed_off(request)
            elif request.prefill_id == worker_id and not request.handed_off:
                commands += self._lost(request, worker_id, "prefill", now_ms)
        return commands + self._pump(now_ms)

    def on_prefill_event(
        self, worker_id: str, event: worker_pb2.PrefillEvent, now_ms: float
    ) -> list[Command]:
        self._workers.prefill_load(worker_id, event.load, refused=event.failed.code == _NO_ROOM)
        kind = event.WhichOneof("event")
        commands: list[Command] = []
        request = self._by_key.get(getattr(event, kind).key) if kind else None
        if request is not None:
            if kind == "started":
                request.times.note_start(event.started, now_ms)
            elif kind == "first_token":
                request.times.prefill_ms += event.first_token.prefill_ms
                commands = self._tokens(request, 0, [event.first_token.token_id], now_ms)
            elif kind == "handed_off":
                request.times.note_hand_off(event.handed_off)
                commands = self._handed_off(request)
            elif kind == "failed" and request.state is RequestState.DECODING:
                commands = self._handed_off(request)  # the decode worker has it all the same
            elif kind == "failed":
                commands = self._failed(request, event.failed, now_ms)
        return commands + self._pump(now_ms)

    def on_decode_event(
        self, worker_id: str, event: worker_pb2.DecodeEvent, now_ms: float
    ) -> list[Command]:
        self._workers.decode_load(worker_id, event.load, refused=event.failed.code == _NO_ROOM)
        kind = event.WhichOneof("event")
        commands: list[Command] = []
        if kind == "reserved":
            commands = self._reserved(event.reserved)
        elif kind == "failed" and event.failed.key in self._by_key:
            commands = self._failed(self._by_key[event.failed.key], event.failed, now_ms)
        elif kind == "step":
            for output in event.step.outputs:
                commands += self._output(output, now_ms)
        return commands + self._pump(now_ms)

    def expire(self, now_ms: float) -> list[Command]:
        """Ends the waits whose time is up; called about once a second."""
        self._workers.forget_refusals()
        commands: list[Command] = []
        for request in list(self._requests.values()):
            if request.state is RequestState.QUEUED:
                commands += self._end_wait(request, now_ms)
            elif (
                request.state is RequestState.RESERVING
                and now_ms - request.placed_at_ms > self._config.reserve_ms
            ):
                why = f"{request.decode_id} did not answer Reserve"
                commands += self._retry(request, why, now_ms)
        return commands + self._pump(now_ms)

    # ---- steps of one request

    def _pump(self, now_ms: float) -> list[Command]:
        """Places requests from the head of the queue for as long as there is room."""
        commands: list[Command] = []
        while self._queue:
            request = self._queue[0]
            if self._never_fits(request):
                tokens = len(request.prompt) + request.sampling.max_tokens
                most = self._workers.context_tokens_seen
                trouble = f"prompt and answer may need {tokens} tokens, the workers hold {most}"
                commands += self._fail(request, InvalidTrouble(trouble))
                continue
            placement = place(
                self._workers.prefill_views(),
                self._workers.decode_views(),
                prompt_tokens=request.prompt_tokens_now,
                max_tokens=request.max_tokens_now,
                backlog_tokens_max=self._config.prefill_backlog_tokens,
                avoid=frozenset(request.failed_pairs),
            )
            if placement is None:
                break
            self._queue.popleft()
            commands.append(self._place(request, placement, now_ms))
        return commands

    def _never_fits(self, request: Request) -> bool:
        """Longer than anything that was ever connected.

        Not than what is connected now: a larger worker that died is being replaced. Until then
        its requests wait, and others behind them, at most queue_wait_ms. And nothing is known
        while a role has no worker.
        """
        tokens = len(request.prompt) + request.sampling.max_tokens
        return self.context_tokens is not None and tokens > self._workers.context_tokens_seen

    def _place(self, request: Request, placement: Placement, now_ms: float) -> Command:
        request.on(RequestEvent.PLACE)
        request.attempt += 1
        request.key, self._next_key = self._next_key, self._next_key + 1
        request.base = len(request.answer)
        request.prefill_id, request.decode_id = placement.prefill, placement.decode
        request.placed_at_ms = now_ms
        request.handed_off = False
        decode = self._workers.decode[placement.decode]
        request.name_blocks(decode.model_fingerprint, decode.block_size)
        self._by_key[request.key] = request
        self._workers.claim(
            request.key, placement, request.prompt_tokens_now, request.max_tokens_now
        )
        return reserve(request)

    def _reserved(self, reserved: worker_pb2.Reserved) -> list[Command]:
        request = self._by_key.get(reserved.key)
        if request is None or request.state is not RequestState.RESERVING:
            return []
        request.on(RequestEvent.RESERVED)
        self._workers.reserved(request.key)
        return [prefill(request, reserved.ticket)]

    def _output(self, output: worker_pb2.SequenceOutput, now_ms: float) -> list[Command]:
        request = self._by_key.get(output.key)
        if request is None:
            return []
        if request.state is RequestState.PREFILLING:
            request.on(RequestEvent.ACCEPTED)
        commands = self._tokens(request, output.offset, output.token_ids, now_ms)
        if output.ending != worker_pb2.ENDING_NONE and request.state is RequestState.DECODING:
            eos = output.ending == worker_pb2.ENDING_EOS
            request.ending = Ending.EOS if eos else Ending.LENGTH
            commands += self._finish_if_complete(request)
        return commands

    def _tokens(
        self, request: Request, offset: int, tokens: Sequence[int], now_ms: float
    ) -> list[Command]:
        try:
            new = request.log(offset, tokens, now_ms)
        except TokenMismatchError as error:
            return self._retry(request, str(error), now_ms)
        if not new:
            return []
        self._workers.computed(request.key)
        return [Deliver(request, len(request.answer) - len(new), new)]

    def _handed_off(self, request: Request) -> list[Command]:
        request.handed_off = True
        self._workers.computed(request.key)
        return self._finish_if_complete(request)

    def _finish_if_complete(self, request: Request) -> list[Command]:
        """An answer is complete when D has ended it and P has said what the hand-off cost."""
        if request.ending is None or not request.handed_off:
            return []
        self._end(request)
        return [Finished(request, request.ending)]

    # ---- when something went wrong

    def _failed(self, request: Request, failed: worker_pb2.Failed, now_ms: float) -> list[Command]:
        if failed.code == FailureCode.FAILURE_CODE_INVALID:
            return self._withdraw(request) + self._fail(request, InvalidTrouble(failed.message))
        begun = request.state is RequestState.DECODING or len(request.answer) > request.base
        if failed.code == _NO_ROOM and not begun:
            return self._refused(request, now_ms)
        if failed.code == FailureCode.FAILURE_CODE_PEER_LOST:
            request.suspects = {request.prefill_id, request.decode_id}
        return self._retry(request, failed.message, now_ms)

    def _refused(self, request: Request, now_ms: float) -> list[Command]:
        """A worker had no room. Nothing has failed: no attempt is counted, the wait goes on."""
        commands = self._withdraw(request)
        request.attempt -= 1
        request.on(RequestEvent.RETRY)
        self._queue.appendleft(request)
        return commands + self._end_wait(request, now_ms)

    def _lost(self, request: Request, worker_id: str, role: str, now_ms: float) -> list[Command]:
        if worker_id in request.suspects:
            # Its peer knew before us, and the attempt since then met the same death.
            request.suspects.clear()
            request.attempt -= 1
        return self._retry(request, f"{role} worker {worker_id} was lost", now_ms)

    def _retry(self, request: Request, why: str, now_ms: float) -> list[Command]:
        commands = self._withdraw(request)
        ending = request.complete()
        if ending is not None:
            self._end(request)
            return [*commands, Finished(request, ending)]
        if request.attempt >= self._config.attempts_max:
            trouble = UnavailableTrouble(f"failed {request.attempt} times, last: {why}")
            return commands + self._fail(request, trouble)
        request.failed_pairs.add((request.prefill_id, request.decode_id))
        request.on(RequestEvent.RETRY)
        request.queued_at_ms = now_ms
        self._queue.appendleft(request)
        return commands

    def _end_wait(self, request: Request, now_ms: float) -> list[Command]:
        """Fails a queued request whose time is up."""
        if now_ms - request.queued_at_ms <= self._config.queue_wait_ms:
            return []
        trouble = f"no worker had room for it in {self._config.queue_wait_ms / 1000:g} s"
        return self._fail(request, ExhaustedTrouble(trouble))

    def _withdraw(self, request: Request) -> list[Command]:
        """Takes the present attempt back from both workers."""
        if not self._release(request):
            return []
        commands: list[Command] = []
        if request.decode_id in self._workers.decode:
            commands.append(cancel_decode(request))
        asked_prefill = request.state is not RequestState.RESERVING
        if asked_prefill and request.prefill_id in self._workers.prefill:
            commands.append(cancel_prefill(request))
        return commands

    def _fail(self, request: Request, trouble: Trouble) -> list[Command]:
        self._end(request)
        return [Failed(request, trouble)]

    def _end(self, request: Request) -> None:
        if request.state is RequestState.QUEUED:
            self._queue.remove(request)
        request.on(RequestEvent.END)
        self._release(request)
        del self._requests[request.request_id]

    def _release(self, request: Request) -> bool:
        """Ends the present attempt here; false when there is none."""
        if self._by_key.pop(request.key, None) is None:
            return False
        self._workers.release(request.key)
        return True

    def check(self) -> None:
        """Asserts that the sums kept for each worker are those of its requests. For tests."""
        self._workers.check(self._by_key.values())
