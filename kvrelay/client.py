"""The client of the gRPC contract: owns how a program asks kvrelay for text, and reads it.

Called by the command line, the load generator, the tests and users' own programs. `Client` blocks,
`AsyncClient` is awaited; both build their requests with kvrelay/request.py, fold what comes back
with kvrelay/answer.py and tell failures as kvrelay/peer.py does. Users import all names from here.
Imports neither torch nor transformers, so it starts in a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio

from kvrelay.answer import (
    Answer,
    Completion,
    Delta,
    Model,
    Timings,
    Tokens,
    models_from,
    tokens_from,
)
from kvrelay.credentials import authorization, channel_credentials
from kvrelay.peer import KvrelayError, Peer, checked_address
from kvrelay.request import (
    RequestOptions,
    SamplingOptions,
    chat_request,
    generate_request,
    tokenize_request,
)
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT_S",
    "MESSAGE_BYTES_MAX",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Delta",
    "KvrelayError",
    "Model",
    "RequestOptions",
    "SamplingOptions",
    "Stream",
    "Timings",
    "Tokens",
]

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

_StreamT = TypeVar("_StreamT")


class _BaseClient(Generic[_StreamT]):
    """What both clients do alike: connect, and ask for what comes as a stream."""

    def __init__(
        self,
        address: str,
        timeout_s: float,
        api_key: str | None,
        certificates: Path | None,
        channels: Any,  # grpc or grpc.aio
        stream: Callable[[Any, Peer], _StreamT],
    ) -> None:
        self._peer = Peer(checked_address(address), timeout_s)
        self._metadata = authorization(api_key)
        if certificates is None:
            self._channel = channels.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = channels.secure_channel(
                address, channel_credentials(certificates), options=_CHANNEL_OPTIONS
            )
        self._stub = InferenceStub(self._channel)
        self._stream = stream

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> _StreamT:
        """Continues `prompt`, a text or token ids. Returns at once; read the stream."""
        return self._ask(self._stub.Generate, generate_request(prompt, options), timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> _StreamT:
        """Answers messages of `role` and `content`; a text is one message of the user."""
        return self._ask(self._stub.Chat, chat_request(messages, options), timeout_s)

    def _ask(self, method: Any, request: Any, timeout_s: float | None) -> _StreamT:
        peer = self._peer.within(timeout_s)
        return self._stream(self._call(method, request, peer), peer)

    def _call(self, method: Any, request: Any, peer: Peer | None = None) -> Any:
        timeout_s = (peer or self._peer).timeout_s
        return method(request, timeout=timeout_s, metadata=self._metadata)


class Client(_BaseClient["Stream"]):
    """A blocking client of one server, safe to use from several threads.

    `timeout_s` limits each request from sending to its last token, unless the request names its
    own. `api_key` goes with every request. `certificates` is a folder with the ca.pem that the
    server's certificate is from, and with a cert.pem and key.pem to show if the server asks for
    them; without it nothing is encrypted. Every method, and every stream while it is read, raises
    KvrelayError.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        certificates: Path | None = None,
    ) -> None:
        super().__init__(address, timeout_s, api_key, certificates, grpc, Stream)

    def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = tokenize_request(text, model)
        with self._peer.explaining():
            return tokens_from(self._call(self._stub.Tokenize, request))

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        with self._peer.explaining():
            return models_from(self._call(self._stub.ListModels, pb.ListModelsRequest()))

    def close(self) -> None:
        """Cancels what is running and hangs up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_BaseClient["AsyncStream"]):
    """`Client` for asyncio; make it where the event loop runs. Same arguments, same errors."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        certificates: Path | None = None,
    ) -> None:
        super().__init__(address, timeout_s, api_key, certificates, grpc.aio, AsyncStream)

    async def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = tokenize_request(text, model)
        with self._peer.explaining():
            return tokens_from(await self._call(self._stub.Tokenize, request))

    async def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        with self._peer.explaining():
            return models_from(await self._call(self._stub.ListModels, pb.ListModelsRequest()))

    async def close(self) -> None:
        """Cancels what is running and hangs up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _BaseStream:
    """What both streams do alike: cancel, and keep the first failure."""

    def __init__(self, call: Any, peer: Peer) -> None:
        self._call = call
        self._peer = peer
        self._answer = Answer()
        self._failure: KvrelayError | None = None

    def cancel(self) -> None:
        """Ends the request here and at the server; without effect once it has ended."""
        self._call.cancel()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Around each read of the call, which is cancelled once it has failed and is no use."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._peer.explaining():
                yield
        except KvrelayError as error:
            self._failure = error
            self.cancel()
            raise


class Stream(_BaseStream):
    """One answer on its way: iterates over its text, piece by piece, as it comes.

    Use it in a `with` statement to have the request cancelled if the block is left early. Once it
    has failed, every later read raises the same KvrelayError.
    """

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

    def _next_delta(self) -> Delta | None:
        with self._reading():
            if self._answer.ended:
                return None
            for event in self._call:
                if (delta := self._answer.take(event)) is not None:
                    return delta
            self._answer.end()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncStream(_BaseStream):
    """`Stream` for asyncio. A task cancelled while it reads cancels the request as well."""

    def __init__(self, call: Any, peer: Peer) -> None:
        super().__init__(call, peer)
        self._events = aiter(call)

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

    async def _next_delta(self) -> Delta | None:
        with self._reading():
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
