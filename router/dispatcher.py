"""The router's core: queue, placement, token logs, retries.

A pure object: the service tells it what happened and carries out the commands it returns. It has
no clock, no socket and no task, so it can be driven by tests and by a simulator as it is.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import DecodeCommand, FailureCode, PrefillCommand
from router.policy import DecodeView, PrefillView, answer_blocks, place
from router.request import Ending, Request, RequestEvent, RequestState, TokenMismatchError


class DuplicateRequestError(Exception):
    """A running request has this id."""


class QueueFullError(Exception):
    """`queue_max` requests are waiting."""


# ---- commands


@dataclass(frozen=True)
class ToPrefill:
    worker_id: str
    command: PrefillCommand


@dataclass(frozen=True)
class ToDecode:
    worker_id: str
    command: DecodeCommand


@dataclass(frozen=True)
class Deliver:
    """New tokens of an answer, in order, each once."""

    request: Request
    offset: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Finished:
    request: Request
    ending: Ending


class Trouble(Exception):
    """Why a request could not be finished; raised to its client."""


class ExhaustedTrouble(Trouble):
    """No room in time: try again later."""


class UnavailableTrouble(Trouble):
    """Workers failed it too often."""


class InvalidTrouble(Trouble):
    """No worker here can ever serve it."""


@dataclass(frozen=True)
class Failed:
    request: Request
    trouble: Trouble


Command = ToPrefill | ToDecode | Deliver | Finished | Failed


# ---- workers as the dispatcher knows them


@dataclass
class _Prefill:
    block_size: int
    blocks_total: int
    max_model_tokens: int
    queued_tokens: int = 0


@dataclass
class _Decode:
    block_size: int
    blocks_total: int
    max_model_tokens: int
    blocks_free: int
    running: int = 0


class Dispatcher:
    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._queue: deque[Request] = deque()
        self._requests: dict[str, Request] = {}
        self._by_key: dict[int, Request] = {}
        self._next_key = 1
        self._prefill: dict[str, _Prefill] = {}
        self._decode: dict[str, _Decode] = {}

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
        """The client has all it wants, or is gone. Nothing more is delivered."""
        if request.state is RequestState.ENDED:
            return []
        commands = self._withdraw(request)
        self._end(request)
        return commands + self._pump(now_ms)

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and answer that the connected workers can hold; None without workers."""
        prefill = [p.max_model_tokens for p in self._prefill.values()]
        decode = [d.max_model_tokens for d in self._decode.values()]
        return min(max(prefill), max(decode)) if prefill and decode else None

    def __len__(self) -> int:
        return len(self._requests)

    # ---- what workers do

    def prefill_up(self, worker_id: str, info: worker_pb2.WorkerInfo, now: float) -> list[Command]:
        self._prefill[worker_id] = _Prefill(
            info.layout.block_size, info.blocks_total, info.max_model_tokens
        )
        return self._pump(now)

    def decode_up(self, worker_id: str, info: worker_pb2.WorkerInfo, now: float) -> list[Command]:
        total = info.blocks_total
        self._decode[worker_id] = _Decode(
            info.layout.block_size, total, info.max_model_tokens, blocks_free=total
        )
        return self._pump(now)

    def worker_down(self, worker_id: str, now_ms: float) -> list[Command]:
        """Every request that needs this worker is placed again."""
        self._prefill.pop(worker_id, None)
        self._decode.pop(worker_id, None)
        commands: list[Command] = []
        # The newest first: each goes to the head of the queue, so they keep their order.
        for request in sorted(self._by_key.values(), key=lambda r: r.key, reverse=True):
            if request.decode_id == worker_id:
                commands += self._retry(request, f"decode worker {worker_id} was lost", now_ms)
            elif request.prefill_id == worker_id and request.state is RequestState.DECODING:
                commands += self._handed_off(request)
            elif request.prefill_id == worker_id and not request.handed_off:
                commands += self._retry(request, f"prefill worker {worker_id} was lost", now_ms)
        return commands + self._pump(now_ms)

    def on_prefill_event(
        self, worker_id: str, event: worker_pb2.PrefillEvent, now_ms: float
    ) -> list[Command]:
        worker = self._prefill.get(worker_id)
        if worker is not None:
            worker.queued_tokens = event.load.queued_tokens
        kind = event.WhichOneof("event")
        commands: list[Command] = []
        request = self._by_key.get(getattr(event, kind).key) if kind else None
        if request is not None:
            if kind == "started" and request.times.prefill_began_at_ms is None:
                request.times.prefill_began_at_ms = now_ms
            elif kind == "first_token":
                request.times.prefill_ms += event.first_token.prefill_ms
                commands = self._tokens(request, 0, [event.first_token.token_id], now_ms)
            elif kind == "handed_off":
                _note_hand_off(request, event.handed_off)
                commands = self._handed_off(request)
            elif kind == "failed" and request.state is RequestState.DECODING:
                commands = self._handed_off(request)  # the decode worker has it all the same
            elif kind == "failed":
                commands = self._failed(request, event.failed, now_ms)
        return commands + self._pump(now_ms)

    def on_decode_event(
        self, worker_id: str, event: worker_pb2.DecodeEvent, now_ms: float
    ) -> list[Command]:
        worker = self._decode.get(worker_id)
        if worker is not None:
            worker.blocks_free = event.load.blocks_free
            worker.running = event.load.running
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
        commands: list[Command] = []
        for request in list(self._requests.values()):
            waited_ms = now_ms - request.queued_at_ms
            if request.state is RequestState.QUEUED and waited_ms > self._config.queue_wait_ms:
                trouble = f"no worker had room for it in {self._config.queue_wait_ms / 1000:g} s"
                commands += self._fail(request, ExhaustedTrouble(trouble))
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
            placement = place(
                self._prefill_views(),
                self._decode_views(),
                prompt_tokens=len(request.prompt) + len(request.answer),
                max_tokens=request.max_tokens_now,
                backlog_tokens_max=self._config.prefill_backlog_tokens,
            )
            if placement is None:
                break
            self._queue.popleft()
            request.on(RequestEvent.PLACE)
            request.attempt += 1
            request.key, self._next_key = self._next_key, self._next_key + 1
            request.base = len(request.answer)
            request.prefill_id, request.decode_id = placement.prefill, placement.decode
            request.placed_at_ms = now_ms
            request.handed_off = False
            self._by_key[request.key] = request
            reserve = worker_pb2.Reserve(
                key=request.key,
                request_id=request.request_id,
                attempt=request.attempt,
                prompt_tokens=len(request.prompt) + len(request.answer),
                sampling=_sampling(request),
            )
            commands.append(ToDecode(request.decode_id, DecodeCommand(reserve=reserve)))
        return commands

    def _reserved(self, reserved: worker_pb2.Reserved) -> list[Command]:
        request = self._by_key.get(reserved.key)
        if request is None or request.state is not RequestState.RESERVING:
            return []
        request.on(RequestEvent.RESERVED)
        prefill = worker_pb2.Prefill(
            key=request.key,
            prompt_token_ids=request.prompt_now,
            sampling=_sampling(request),
            ticket=reserved.ticket,
        )
        return [ToPrefill(request.prefill_id, PrefillCommand(prefill=prefill))]

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
        return [Deliver(request, len(request.answer) - len(new), new)]

    def _handed_off(self, request: Request) -> list[Command]:
        request.handed_off = True
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
        if failed.code == FailureCode.FAILURE_CODE_EXHAUSTED and (
            request.state is RequestState.RESERVING
        ):
            request.attempt -= 1  # nothing has failed: there was only no room
        return self._retry(request, failed.message, now_ms)

    def _retry(self, request: Request, why: str, now_ms: float) -> list[Command]:
        commands = self._withdraw(request)
        ending = request.complete()
        if ending is not None:
            self._end(request)
            return [*commands, Finished(request, ending)]
        if request.attempt >= self._config.attempts_max:
            trouble = UnavailableTrouble(f"failed {request.attempt} times, last: {why}")
            return commands + self._fail(request, trouble)
        request.on(RequestEvent.RETRY)
        request.queued_at_ms = now_ms
        self._queue.appendleft(request)
        return commands

    def _withdraw(self, request: Request) -> list[Command]:
        """Takes the present attempt back from both workers."""
        if self._by_key.pop(request.key, None) is None:
            return []
        cancel = worker_pb2.Cancel(key=request.key)
        commands: list[Command] = []
        if request.decode_id in self._decode:
            commands.append(ToDecode(request.decode_id, DecodeCommand(cancel=cancel)))
        if request.state is not RequestState.RESERVING and request.prefill_id in self._prefill:
            commands.append(ToPrefill(request.prefill_id, PrefillCommand(cancel=cancel)))
        return commands

    def _fail(self, request: Request, trouble: Trouble) -> list[Command]:
        self._end(request)
        return [Failed(request, trouble)]

    def _end(self, request: Request) -> None:
        if request.state is RequestState.QUEUED:
            self._queue.remove(request)
        request.on(RequestEvent.END)
        self._by_key.pop(request.key, None)
        del self._requests[request.request_id]

    # ---- snapshots for the policy

    def _prefill_views(self) -> list[PrefillView]:
        mine: dict[str, int] = dict.fromkeys(self._prefill, 0)
        for request in self._by_key.values():
            if request.prefill_id in mine and len(request.answer) == request.base:
                mine[request.prefill_id] += len(request.prompt) + request.base
        # The worker's own figure knows of other routers, ours of what is still under way.
        return [
            PrefillView(
                worker_id, max(p.queued_tokens, mine[worker_id]), p.blocks_total, p.block_size
            )
            for worker_id, p in self._prefill.items()
        ]

    def _decode_views(self) -> list[DecodeView]:
        asked = dict.fromkeys(self._decode, 0)
        sequences = dict.fromkeys(self._decode, 0)
        for request in self._by_key.values():
            if request.decode_id not in asked:
                continue
            sequences[request.decode_id] += 1
            if request.state is RequestState.RESERVING:  # not in the worker's figure yet
                size = self._decode[request.decode_id].block_size
                prompt = len(request.prompt) + len(request.answer)
                asked[request.decode_id] += answer_blocks(prompt, request.max_tokens_now, size)
        return [
            DecodeView(
                worker_id,
                d.blocks_free - asked[worker_id],
                d.blocks_total,
                max(sequences[worker_id], d.running),
                d.block_size,
            )
            for worker_id, d in self._decode.items()
        ]


def _sampling(request: Request) -> worker_pb2.Sampling:
    sampling = request.sampling
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=request.max_tokens_now,
        eos_token_ids=sampling.eos_token_ids,
    )


def _note_hand_off(request: Request, handed_off: worker_pb2.HandedOff) -> None:
    times = request.times
    times.kv_bytes += handed_off.kv_bytes
    times.kv_transfer_ms += handed_off.kv_transfer_ms
    times.kv_exposed_ms += handed_off.kv_exposed_ms
    times.transport = handed_off.transport
