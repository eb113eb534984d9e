"""A double of the server for the client's tests: real gRPC, but the answers are written down.

Used by tests/client and tests/cluster. It checks nothing and runs no model; what the client sent
is kept for the test to look at.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

# Only a broken test waits this long.
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Refusal:
    """A step that ends the call with a status."""

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str], ...] = ()


class Hold:
    """A step that says nothing until the client has gone."""


# A threading.Event as a step stops the script until the test sets it.
Step = pb.GenerateResponse | Refusal | Hold | threading.Event


def accepted(**fields: object) -> pb.GenerateResponse:
    defaults = {"request_id": "r-1", "model": "tiny", "prompt_tokens": 5, "seed": 7, "nonce": 2**63}
    return pb.GenerateResponse(accepted=pb.Accepted(**{**defaults, **fields}))


def delta(
    offset: int, token_ids: Sequence[int], text: str, kept_at: str = ""
) -> pb.GenerateResponse:
    message = pb.Delta(offset=offset, token_ids=token_ids, text=text, kept_at=kept_at)
    return pb.GenerateResponse(delta=message)


def finished(
    completion_tokens: int, reason: pb.FinishReason = pb.FINISH_REASON_STOP
) -> pb.GenerateResponse:
    timings = pb.Timings(
        queue_ms=1.5,
        prefill_ms=20.0,
        ttft_ms=25.0,
        tpot_ms=10.0,
        kv_bytes=4_000_000,
        kv_transfer_ms=2.0,
        kv_exposed_ms=0.5,
        transport="shm",
    )
    return pb.GenerateResponse(
        finished=pb.Finished(
            reason=reason,
            prompt_tokens=5,
            cached_tokens=3,
            completion_tokens=completion_tokens,
            timings=timings,
        )
    )


def answer(*pieces: str) -> list[Step]:
    """A whole good answer of one token per piece."""
    deltas = [delta(i, [100 + i], piece) for i, piece in enumerate(pieces)]
    return [accepted(), *deltas, finished(len(pieces))]


@dataclass
class ScriptedServer(InferenceServicer):
    """Plays `scripts`, one per Generate, Chat or Resume call, the last one for every call after
    it."""

    address: str = ""
    scripts: list[list[Step]] = field(default_factory=lambda: [answer("Hel", "lo")])
    requests: list[pb.GenerateRequest | pb.ChatRequest | pb.ResumeRequest] = field(
        default_factory=list
    )
    stop: Callable[[], object] = lambda: None  # hangs up on everybody
    refusal: Refusal | None = None  # of Tokenize and ListModels
    held: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._play(request, context)

    def Chat(
        self, request: pb.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._play(request, context)

    def Resume(
        self, request: pb.ResumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._play(request, context)

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        self._maybe_refuse(context)
        return pb.TokenizeResponse(token_ids=map(ord, request.text), tokens=list(request.text))

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        self._maybe_refuse(context)
        model = pb.Model(name="tiny", max_model_tokens=2048, vocab_size=512, has_chat_template=True)
        return pb.ListModelsResponse(models=[model])

    def _maybe_refuse(self, context: grpc.ServicerContext) -> None:
        if self.refusal is not None:
            context.abort(self.refusal.code, self.refusal.details)

    def _play(
        self,
        request: pb.GenerateRequest | pb.ChatRequest | pb.ResumeRequest,
        context: grpc.ServicerContext,
    ) -> Iterator[pb.GenerateResponse]:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        gone, played = threading.Event(), threading.Event()

        def note_end() -> None:
            gone.set()
            if not played.is_set():
                self.cancelled.set()

        if not context.add_callback(note_end):
            note_end()
        for step in script:
            if isinstance(step, Refusal):
                played.set()
                context.set_trailing_metadata(step.trailing)
                context.abort(step.code, step.details)
            elif isinstance(step, threading.Event):
                assert step.wait(DEADLINE_S)
            elif isinstance(step, Hold):
                self.held.set()
                assert gone.wait(DEADLINE_S)
            else:
                yield step
        played.set()


@contextlib.contextmanager
def scripted_server(message_bytes_max: int | None = None) -> Iterator[ScriptedServer]:
    """Serves on a free port of this host; `address` says which."""
    options = (
        []
        if message_bytes_max is None
        else [("grpc.max_receive_message_length", message_bytes_max)]
    )
    double = ScriptedServer()
    with futures.ThreadPoolExecutor(max_workers=4) as pool:
        server = grpc.server(pool, options=options)
        add_InferenceServicer_to_server(double, server)
        double.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        double.stop = lambda: server.stop(None).wait(DEADLINE_S)
        server.start()
        try:
            yield double
        finally:
            double.stop()
