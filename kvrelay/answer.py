"""What a server gives back: owns the results, and the order in which an answer's events must come.

Called by kvrelay/client.py with messages that it has read; nothing here reads or waits.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from kvrelay.peer import KvrelayError
from kvrelay.wire import inference_pb2 as pb


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went: kvrelay.v1.Timings, measured by the server."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    tpot_ms: float
    kv_bytes: int
    kv_transfer_ms: float
    kv_exposed_ms: float
    transport: str


@dataclass(frozen=True)
class Delta:
    """Tokens and text that came together; they need not cover the same part of the answer."""

    offset: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Completion:
    """A whole answer. `seed` and `request_id` are the ones used, given or drawn by the server."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seed: int
    request_id: str
    model: str
    timings: Timings
    cached_tokens: int = 0  # of the prompt: their KV was kept from an earlier request


@dataclass(frozen=True)
class Tokens:
    """A text cut into tokens; `tokens` spells each of `token_ids` as the vocabulary does."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model served; `max_model_tokens` limits prompt and answer together."""

    name: str
    max_model_tokens: int
    vocab_size: int
    has_chat_template: bool


class _Phase(enum.Enum):
    OPEN = "before the request was accepted"
    ANSWERING = "before the answer was finished"
    FINISHED = "after the answer was finished"


# The contract's order of events: one Accepted, any number of Delta, one Finished.
_NEXT_PHASE = {
    (_Phase.OPEN, "accepted"): _Phase.ANSWERING,
    (_Phase.ANSWERING, "delta"): _Phase.ANSWERING,
    (_Phase.ANSWERING, "finished"): _Phase.FINISHED,
}

_FINISH_REASONS: dict[int, Literal["stop", "length"]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


class Answer:
    """Folds the events of one answer and refuses what breaks the contract."""

    def __init__(self) -> None:
        self.ended = False  # the server closed the stream, and all was well
        self._phase = _Phase.OPEN
        self._accepted = pb.Accepted()
        self._finished = pb.Finished()
        self._token_ids: list[int] = []
        self._texts: list[str] = []

    def take(self, event: pb.GenerateResponse) -> Delta | None:
        """The delta in `event`, if it is one. An illegal event raises and changes nothing."""
        kind = event.WhichOneof("event") or "unknown"
        phase = _NEXT_PHASE.get((self._phase, kind))
        if phase is None:
            raise _contract_broken(f"sent an event of kind {kind} {self._phase.value}")
        delta = None
        if kind == "accepted":
            self._accepted = event.accepted
        elif kind == "delta":
            delta = self._append(event.delta)
        elif event.finished.reason in _FINISH_REASONS:
            self._finished = event.finished
        else:
            raise _contract_broken(f"gave the unknown finish reason {event.finished.reason}")
        self._phase = phase
        return delta

    def end(self) -> None:
        """The server closed the stream."""
        if self._phase is not _Phase.FINISHED:
            raise _contract_broken(f"closed the stream {self._phase.value}")
        self.ended = True

    def completion(self) -> Completion:
        """The whole answer; only once it has ended."""
        assert self.ended
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=_FINISH_REASONS[self._finished.reason],
            prompt_tokens=self._finished.prompt_tokens,
            completion_tokens=self._finished.completion_tokens,
            seed=self._accepted.seed,
            request_id=self._accepted.request_id,
            model=self._accepted.model,
            timings=Timings(**_fields(Timings, self._finished.timings)),
            cached_tokens=self._finished.cached_tokens,
        )

    def _append(self, wire: pb.Delta) -> Delta:
        # A delta of text alone, which was held back, has no first token to be the offset of.
        if wire.token_ids and wire.offset != len(self._token_ids):
            raise _contract_broken(
                f"sent token {wire.offset} of the answer where token {len(self._token_ids)} was due"
            )
        delta = Delta(len(self._token_ids), tuple(wire.token_ids), wire.text)
        self._token_ids.extend(delta.token_ids)
        self._texts.append(delta.text)
        return delta


def tokens_from(wire: pb.TokenizeResponse) -> Tokens:
    """The tokens of a Tokenize call."""
    return Tokens(tuple(wire.token_ids), tuple(wire.tokens))


def models_from(wire: pb.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a ListModels call."""
    return tuple(Model(**_fields(Model, model)) for model in wire.models)


def _fields(kind: type[Timings | Model], wire: Any) -> dict[str, Any]:
    return {field.name: getattr(wire, field.name) for field in dataclasses.fields(kind)}


def _contract_broken(what: str) -> KvrelayError:
    return KvrelayError(grpc.StatusCode.INTERNAL, f"the server {what}")
