"""The client of the gRPC contract: owns how a program asks kvrelay for text, and what it gets back.

Called by the command line, the load generator, the tests and users' own programs. `Client` blocks,
`AsyncClient` is awaited; both build their requests with the same functions and fold what comes back
with the same `_Answer`. Imports neither torch nor transformers, so it starts in a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypedDict, Unpack

import grpc
import grpc.aio

from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 600.0
MESSAGE_BYTES_MAX = 32 * 2**20

_CHANNEL_OPTIONS = (
    # Above what servers take, so that the server's own refusal, which names its limit, is seen.
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A restarted server is found again within a second; gRPC would wait up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class KvrelayError(Exception):
    """A request that failed. `code` is gRPC's status code; str() is one line for a person."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


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


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. What is left out or None is for the server to decide."""

    max_tokens: int | None  # answer length limit in tokens, at least 1
    temperature: float | None  # 0 to 2; 0 is greedy
    top_k: int | None  # keep the k likeliest tokens; 0 keeps all
    top_p: float | None  # keep the likeliest that add up to this, over 0 to 1
    seed: int | None  # same request and seed, same tokens
    stop: str | Sequence[str]  # the answer ends before the first of these


class RequestOptions(SamplingOptions, total=False):
    """What `generate` and `chat` of both clients take besides the prompt and `timeout_s`."""

    model: str  # a name from models(); empty is the model served
    request_id: str  # unique among running requests; empty lets the server make one


class Client:
    """A blocking client of one server, safe to use from several threads.

    `timeout_s` limits each request from sending to its last token, unless the request names its
    own. Every method, and every stream while it is read, raises KvrelayError.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._peer = _Peer(_checked_address(address), timeout_s)
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """Continues `prompt`, a text or token ids. Returns at once; read the stream."""
        peer = self._peer.within(timeout_s)
        request = _generate_request(prompt, options)
        return Stream(self._stub.Generate(request, timeout=peer.timeout_s), peer)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """Answers messages of `role` and `content`; a text is one message of the user."""
        peer = self._peer.within(timeout_s)
        request = _chat_request(messages, options)
        return Stream(self._stub.Chat(request, timeout=peer.timeout_s), peer)

    def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = _message(pb.TokenizeRequest, model=model, text=text)
        with self._peer.explaining():
            return _tokens(self._stub.Tokenize(request, timeout=self._peer.timeout_s))

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        with self._peer.explaining():
            return _models(
                self._stub.ListModels(pb.ListModelsRequest(), timeout=self._peer.timeout_s)
            )

    def close(self) -> None:
        """Cancels what is running and hangs up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """One answer on its way: iterates over its text, piece by piece, as it comes.

    Use it in a `with` statement to have the request cancelled if the block is left early. Once it
    has failed, every later read raises the same KvrelayError.
    """

    def __init__(self, call: Any, peer: _Peer) -> None:
        self._call = call
        self._answer = _Answer(peer)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (delta := self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """What is left of the answer as it came, with its tokens."""
        while (delta := self._next_delta()) is not None:
            yield delta

    def result(self) -> Completion:
        """Reads to the end; the completion holds also what was iterated over before."""
        while self._next_delta() is not None:
            pass
        return self._answer.completion()

    def cancel(self) -> None:
        """Ends the request here and at the server; without effect once it has ended."""
        self._call.cancel()

    def _next_delta(self) -> Delta | None:
        with self._answer.reading(self._call):
            for event in () if self._answer.ended else self._call:
                if (delta := self._answer.take(event)) is not None:
                    return delta
            self._answer.end()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient:
    """`Client` for asyncio; make it where the event loop runs. Same arguments, same errors."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._peer = _Peer(_checked_address(address), timeout_s)
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """Continues `prompt`, a text or token ids. Returns at once; read the stream."""
        peer = self._peer.within(timeout_s)
        request = _generate_request(prompt, options)
        return AsyncStream(self._stub.Generate(request, timeout=peer.timeout_s), peer)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """Answers messages of `role` and `content`; a text is one message of the user."""
        peer = self._peer.within(timeout_s)
        request = _chat_request(messages, options)
        return AsyncStream(self._stub.Chat(request, timeout=peer.timeout_s), peer)

    async def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = _message(pb.TokenizeRequest, model=model, text=text)
        with self._peer.explaining():
            return _tokens(await self._stub.Tokenize(request, timeout=self._peer.timeout_s))

    async def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        with self._peer.explaining():
            return _models(
                await self._stub.ListModels(pb.ListModelsRequest(), timeout=self._peer.timeout_s)
            )

    async def close(self) -> None:
        """Cancels what is running and hangs up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream:
    """`Stream` for asyncio. A task cancelled while it reads cancels the request as well."""

    def __init__(self, call: Any, peer: _Peer) -> None:
        self._call = call
        self._events = aiter(call)
        self._answer = _Answer(peer)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while (delta := await self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is left of the answer as it came, with its tokens."""
        while (delta := await self._next_delta()) is not None:
            yield delta

    async def result(self) -> Completion:
        """Reads to the end; the completion holds also what was iterated over before."""
        while await self._next_delta() is not None:
            pass
        return self._answer.completion()

    def cancel(self) -> None:
        """Ends the request here and at the server; without effect once it has ended."""
        self._call.cancel()

    async def _next_delta(self) -> Delta | None:
        with self._answer.reading(self._call):
            if self._answer.ended:
                return None
            async for event in self._events:
                if (delta := self._answer.take(event)) is not None:
                    return delta
            self._answer.end()
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


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


class _Answer:
    """Folds the events of one answer and refuses what breaks the contract; reads no socket."""

    def __init__(self, peer: _Peer) -> None:
        self.ended = False  # the server closed the stream, and all was well
        self._peer = peer
        self._phase = _Phase.OPEN
        self._failure: KvrelayError | None = None
        self._accepted = pb.Accepted()
        self._finished = pb.Finished()
        self._token_ids: list[int] = []
        self._texts: list[str] = []

    @contextlib.contextmanager
    def reading(self, call: Any) -> Iterator[None]:
        """Around each read of `call`: keeps the first failure, and cancels what is no use now."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._peer.explaining():
                yield
        except KvrelayError as error:
            self._failure = error
            call.cancel()
            raise

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
            timings=_timings(self._finished.timings),
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


@dataclass(frozen=True)
class _Peer:
    """Whom a request is sent to and for how long: what an error has to be told with."""

    address: str
    timeout_s: float

    def within(self, timeout_s: float | None) -> _Peer:
        return self if timeout_s is None else dataclasses.replace(self, timeout_s=timeout_s)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns what gRPC raises into KvrelayError."""
        try:
            yield
        except grpc.RpcError as error:
            raise self.explain(error.code(), error.details() or "") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: it is how grpc.aio reports a call that we cancelled.
            raise KvrelayError(grpc.StatusCode.CANCELLED, _CANCELLED) from None

    def explain(self, code: grpc.StatusCode, details: str) -> KvrelayError:
        """The error to raise: the server's own words, or ours where gRPC's would not help."""
        message = " ".join(details.split())
        if code is grpc.StatusCode.UNAVAILABLE:
            message = self._explain_unavailable(message)
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED and message == "Deadline Exceeded":
            message = f"{self.address} did not finish the request within {self.timeout_s:g} s"
        elif any(words in message for words in _CANCELLED_LOCALLY):
            message = _CANCELLED
        return KvrelayError(code, message or f"{self.address} failed without a word ({code.name})")

    def _explain_unavailable(self, message: str) -> str:
        if message.startswith(_NOT_CONNECTED):
            if "Connection refused" in message:
                return (
                    f"nothing answers at {self.address}; start a server with `kvrelay serve MODEL`"
                )
            return f"cannot reach {self.address}: {message}"
        if "Socket closed" in message or "Connection reset" in message:
            return f"the connection to {self.address} broke off ({message})"
        return message


# How gRPC's own messages begin, and what they hold: the codes are the same as the server's own.
_NOT_CONNECTED = ("failed to connect to all addresses", "errors resolving", "DNS resolution")
_CANCELLED_LOCALLY = ("Locally cancelled by application!", "Channel closed!")
_CANCELLED = "the request was cancelled"


def _contract_broken(what: str) -> KvrelayError:
    return KvrelayError(grpc.StatusCode.INTERNAL, f"the server {what}")


def _checked_address(address: str) -> str:
    # gRPC takes any text, and a port above 65535 modulo 65536: it would call somebody else.
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or (
        host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536
    ):
        return address
    raise KvrelayError(
        grpc.StatusCode.INVALID_ARGUMENT, f"the address must be HOST:PORT, not {address!r}"
    )


def _generate_request(prompt: str | Sequence[int], options: RequestOptions) -> pb.GenerateRequest:
    common = _common_fields(**options)
    if isinstance(prompt, str):
        return _message(pb.GenerateRequest, text=prompt, **common)
    if isinstance(prompt, bytes | bytearray):
        # A sequence of ints to Python, but hardly token ids.
        raise TypeError("the prompt must be str or token ids, not bytes")
    return _message(pb.GenerateRequest, token_ids=_message(pb.TokenIds, ids=prompt), **common)


def _chat_request(
    messages: Sequence[Mapping[str, str]] | str, options: RequestOptions
) -> pb.ChatRequest:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    wire = [_message(pb.ChatMessage, **message) for message in messages]
    return _message(pb.ChatRequest, messages=wire, **_common_fields(**options))


def _common_fields(
    *, model: str = "", request_id: str = "", **sampling: Unpack[SamplingOptions]
) -> dict[str, Any]:
    return {"model": model, "request_id": request_id, "sampling": _sampling(**sampling)}


def _sampling(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> pb.SamplingParams:
    return _message(
        pb.SamplingParams,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
    )


def _message(kind: Any, **fields: Any) -> Any:
    """A wire message, or KvrelayError where a value does not fit its field."""
    try:
        return kind(**fields)
    except UnicodeEncodeError:
        message = "the text cannot be sent: it is not valid Unicode"
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, message) from None
    except ValueError as error:
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


def _timings(wire: pb.Timings) -> Timings:
    return Timings(
        **{field.name: getattr(wire, field.name) for field in dataclasses.fields(Timings)}
    )


def _tokens(wire: pb.TokenizeResponse) -> Tokens:
    return Tokens(tuple(wire.token_ids), tuple(wire.tokens))


def _models(wire: pb.ListModelsResponse) -> tuple[Model, ...]:
    names = [field.name for field in dataclasses.fields(Model)]
    return tuple(Model(**{name: getattr(model, name) for name in names}) for model in wire.models)
