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
    resumed: int = 0  # times that the answer went on after its server was lost


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
    """Folds the events of one answer and refuses what breaks the contract.

    They may come in several streams, one after another: each goes on where the one before broke
    off, or begins anew, and then what is known already must come again and is passed over.
    """

    def __init__(self) -> None:
        self.ended = False  # the server closed the stream, and all was well
        self._phase = _Phase.OPEN
        self._accepted = pb.Accepted()
        self._finished = pb.Finished()
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._chars = 0  # in _texts
        # Where the stream is, in the whole answer: its next token, its next character, and how many
        # of those before it came without tokens after the newest one.
        self._token_at = 0
        self._char_at = 0
        self._chars_after = 0

    @property
    def next_offset(self) -> int:
        """Where the stream that breaks off now could go on."""
        return self._token_at

    def reopen(self, *, anew: bool) -> None:
        """Another stream follows: from the first token on, or from next_offset."""
        self._phase = _Phase.OPEN
        if anew:
            self._token_at = self._char_at = 0
        else:
            self._char_at -= self._chars_after
        self._chars_after = 0

    def take(self, event: pb.GenerateResponse) -> Delta | None:
        """The delta in `event`, if it is one. An illegal event raises and changes nothing."""
        kind = event.WhichOneof("event") or "unknown"
        phase = _NEXT_PHASE.get((self._phase, kind))
        if phase is None:
            raise _contract_broken(f"sent an event of kind {kind} {self._phase.value}")
        delta = None
        if kind == "accepted":
            if self._accepted.request_id and event.accepted.seed != self._accepted.seed:
                raise _contract_broken("accepted the request again with another seed")
            self._accepted = event.accepted
        elif kind == "delta":
            delta = self._append(event.delta)
        elif event.finished.reason in _FINISH_REASONS:
            if self._token_at < len(self._token_ids) or self._char_at < self._chars:
                raise _contract_broken("ended the answer before what had come of it")
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

    def completion(self, resumed: int = 0) -> Completion:
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
            resumed=resumed,
        )

    def _append(self, wire: pb.Delta) -> Delta | None:
        """What is new in it; None when nothing is."""
        # The last text may come without tokens; its offset says nothing.
        if wire.token_ids and wire.offset != self._token_at:
            raise _contract_broken(
                f"sent token {wire.offset} of the answer where token {self._token_at} was due"
            )
        known = self._token_ids[self._token_at : self._token_at + len(wire.token_ids)]
        again = self._text_at(self._char_at, len(wire.text))
        if known != wire.token_ids[: len(known)] or not wire.text.startswith(again):
            raise _contract_broken("gave another answer the second time")
        token_ids, text = tuple(wire.token_ids[len(known) :]), wire.text[len(again) :]
        delta = Delta(len(self._token_ids), token_ids, text)
        self._token_at += len(wire.token_ids)
        self._char_at += len(wire.text)
        self._chars_after = 0 if wire.token_ids else self._chars_after + len(wire.text)
        self._token_ids.extend(token_ids)
        self._texts.append(text)
        self._chars += len(text)
        return delta if token_ids or text or not (known or again) else None

    def _text_at(self, at: int, count: int) -> str:
        return "" if at >= self._chars else "".join(self._texts)[at : at + count]


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
