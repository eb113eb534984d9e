"""A dispatcher driven event by event, whose workers and clients the test plays."""

from dataclasses import dataclass, field
from typing import Any

from router_cases import router_config

from kvrelay.wire import transfer_pb2
from kvrelay.wire import worker_pb2 as pb
from router.admission import Sampling
from router.commands import Command, Deliver, Failed, Finished, ToDecode, ToPrefill, Trouble
from router.dispatcher import Dispatcher
from router.request import Ending, Request, RequestState, Times

S = RequestState
EOS = 999
EXHAUSTED = pb.FAILURE_CODE_EXHAUSTED
PEER_LOST = pb.FAILURE_CODE_PEER_LOST


def make(
    name: str = "r1", prompt: int = 8, max_tokens: int = 4, now: float = 0, **more: Any
) -> Request:
    """more: of the request's urgency, or of its sampling."""
    named = ("priority", "ttft_deadline_ms")
    urgency = {field: more.pop(field) for field in named if field in more}
    sampling = Sampling(0.0, 0, 1.0, 0, max_tokens, (), (EOS,), **more)
    return Request(name, list(range(prompt)), sampling, Times(now), **urgency)


@dataclass
class Client:
    """What one client has seen."""

    tokens: list[int] = field(default_factory=list)
    end: Ending | Trouble | None = None


class Bench:
    """A dispatcher whose commands pile up in `sent`, and whose clients note what they get."""

    def __init__(self, *workers: str, blocks: int = 100, **config: Any) -> None:
        settings_ = {"attempts_max": 3, "queue_max": 4, "prefill_backlog_tokens": 50}
        settings_ |= {"local_prefill": "never", **config}
        self.config = router_config(**settings_)
        self.dispatcher = Dispatcher(self.config)
        self.blocks = blocks
        self.now = 0.0
        self.sent: list[ToPrefill | ToDecode] = []
        self.clients: dict[Request, Client] = {}
        for worker in workers or ("p1", "d1"):
            self.up(worker)

    # ---- what happens

    def up(self, worker: str) -> None:
        up = self.dispatcher.prefill_up if worker[0] == "p" else self.dispatcher.decode_up
        up(worker, self.info(worker))
        self.take([])

    def info(self, worker: str) -> pb.WorkerInfo:
        layout = transfer_pb2.KvLayout(model_fingerprint="m", block_size=4)
        return pb.WorkerInfo(
            instance_id=worker,
            layout=layout,
            blocks_total=self.blocks,
            max_model_tokens=self.blocks * layout.block_size,
        )

    def down(self, worker: str, died: bool = True) -> None:
        self.take(self.dispatcher.worker_down(worker, self.now, died=died))

    def submit(self, *args: Any, **kwargs: Any) -> Request:
        request = make(*args, now=self.now, **kwargs)
        commands = self.dispatcher.submit(request)
        self.clients[request] = Client()
        self.take(commands)
        return request

    def let_go(self, request: Request) -> None:
        self.take(self.dispatcher.let_go(request))

    def expire(self, now: float) -> None:
        self.now = now
        self.take(self.dispatcher.expire(now))

    def drain(self, worker: str, draining: bool = True) -> None:
        if worker[0] == "p":
            event = pb.PrefillEvent(load=pb.PrefillLoad(draining=draining))
            self.take(self.dispatcher.on_prefill_event(worker, event, self.now))
        else:
            load = pb.DecodeLoad(blocks_free=self.blocks, draining=draining)
            event = pb.DecodeEvent(load=load)
            self.take(self.dispatcher.on_decode_event(worker, event, self.now))

    def d(self, worker: str = "d1", free: int | None = None, **event: Any) -> None:
        load = pb.DecodeLoad(blocks_free=self.blocks if free is None else free)
        message = pb.DecodeEvent(load=load, **event)
        self.take(self.dispatcher.on_decode_event(worker, message, self.now))

    def p(self, worker: str = "p1", queued: int = 0, **event: Any) -> None:
        message = pb.PrefillEvent(load=pb.PrefillLoad(queued_tokens=queued), **event)
        self.take(self.dispatcher.on_prefill_event(worker, message, self.now))

    def reserved(self, request: Request, free: int | None = None) -> None:
        reserved = pb.Reserved(key=request.key)
        if not request.prefill_here:
            reserved.ticket.request_id = request.request_id
        self.d(request.decode_id, free, reserved=reserved)

    def first_token(self, request: Request, token: int, **times: float) -> None:
        first_token = pb.FirstToken(key=request.key, token_id=token, **times)
        if request.prefill_here:
            self.d(request.decode_id, first_token=first_token)
        else:
            self.p(request.prefill_id, first_token=first_token)

    def handed_off(self, request: Request, **numbers: Any) -> None:
        self.p(request.prefill_id, handed_off=pb.HandedOff(key=request.key, **numbers))

    def step(self, request: Request, offset: int, *tokens: int, ending: int = 0) -> None:
        output = pb.SequenceOutput(
            key=request.key, offset=offset, token_ids=tokens, ending=pb.Ending.ValueType(ending)
        )
        self.d(request.decode_id, step=pb.StepOutput(outputs=[output]))

    def d_fails(self, request: Request, code: int = PEER_LOST, **load: Any) -> None:
        failed = pb.Failed(key=request.key, code=pb.FailureCode.ValueType(code), message="boom")
        self.d(request.decode_id, failed=failed, **load)

    def p_fails(self, request: Request, code: int = PEER_LOST, queued: int = 0) -> None:
        failed = pb.Failed(key=request.key, code=pb.FailureCode.ValueType(code), message="boom")
        self.p(request.prefill_id, queued, failed=failed)

    def bring(self, request: Request, state: RequestState) -> Request:
        """On from RESERVING; DECODING has tokens 10 and 11."""
        assert request.state is S.RESERVING
        if state is not S.RESERVING:
            self.reserved(request)
        if state is S.DECODING:
            self.first_token(request, 10)
            self.step(request, 0, 10)
            self.step(request, 1, 11)
        assert request.state is state
        return request

    # ---- what came of it

    def take(self, commands: list[Command]) -> None:
        self.carry_out(commands)
        while self.dispatcher.to_place:
            self.carry_out(self.dispatcher.pump(self.now))
        self.dispatcher.check()

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Deliver(request, offset, tokens):
                    client = self.clients[request]
                    assert client.end is None, "tokens after the end"
                    assert offset == len(client.tokens), "a gap or a repeat"
                    client.tokens.extend(tokens)
                case Finished(request, end) | Failed(request, end):
                    assert self.clients[request].end is None, "ended twice"
                    self.clients[request].end = end
                case _:
                    self.sent.append(command)

    def reserves(self) -> list[tuple[str, pb.Reserve]]:
        return [
            (c.worker_id, c.command.reserve)
            for c in self.sent
            if c.command.WhichOneof("command") == "reserve"
        ]

    def prefills(self) -> list[tuple[str, pb.Prefill]]:
        return [
            (c.worker_id, c.command.prefill)
            for c in self.sent
            if c.command.WhichOneof("command") == "prefill"
        ]

    def cancels(self) -> list[tuple[str, int]]:
        return [
            (c.worker_id, c.command.cancel.key)
            for c in self.sent
            if c.command.WhichOneof("command") == "cancel"
        ]

    def seen(self, request: Request) -> list[int]:
        return self.clients[request].tokens

    def end(self, request: Request) -> Ending | Trouble | None:
        return self.clients[request].end
