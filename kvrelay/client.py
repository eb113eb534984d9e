"""The client of the gRPC contract: owns how a program asks kvrelay for text, and reads it.

Called by the command line, the load generator, the tests and users' own programs. `Client` blocks,
`AsyncClient` is awaited; both build their requests with kvrelay/request.py, give out answers as
kvrelay/streams.py has them and tell failures as kvrelay/peer.py does. Users import all names from
here.
Imports neither torch nor transformers, so it starts in a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio

from kvrelay.answer import (
    Completion,
    Delta,
    Model,
    Timings,
    Tokens,
    models_from,
    tokens_from,
)
from kvrelay.peer import KvrelayError
from kvrelay.request import (
    RequestOptions,
    SamplingOptions,
    chat_request,
    generate_request,
    tokenize_request,
)
from kvrelay.resuming import Resuming
from kvrelay.servers import MESSAGE_BYTES_MAX, Servers
from kvrelay.streams import AsyncStream, Stream
from kvrelay.wire import inference_pb2 as pb

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_RESUME_S",
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
DEFAULT_RESUME_S = 30.0

_StreamT = TypeVar("_StreamT")


class _BaseClient(Generic[_StreamT]):
    """What both clients do alike: connect, and ask for what comes as a stream."""

    def __init__(
        self,
        servers: Servers,
        timeout_s: float,
        resume_for_s: float,
        stream: Callable[[Servers, Resuming, float], _StreamT],
    ) -> None:
        self._servers = servers
        self._timeout_s = timeout_s
        self._resume_for_s = resume_for_s
        self._stream = stream

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> _StreamT:
        """Continues `prompt`, a text or token ids. Returns at once; read the stream."""
        return self._ask("Generate", generate_request(prompt, options), timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> _StreamT:
        """Answers messages of `role` and `content`; a text is one message of the user."""
        return self._ask("Chat", chat_request(messages, options), timeout_s)

    def _ask(self, method: str, request: Any, timeout_s: float | None) -> _StreamT:
        resuming = Resuming(
            method,
            request,
            servers=len(self._servers),
            first=self._servers.first,
            resume_for_s=self._resume_for_s,
        )
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return self._stream(self._servers, resuming, timeout_s)


class Client(_BaseClient["Stream"]):
    """A blocking client, safe to use from several threads.

    `address` is a server's, or those of several routers of one cluster with commas between: the
    next one is asked when one is not there. `timeout_s` limits each request from sending to its
    last token, unless the request names its own. `api_key` goes with every request. `certificates`
    is a folder with the ca.pem that the server's certificate is from, and with a cert.pem and
    key.pem to show if the server asks for them; without it nothing is encrypted.

    When a server is lost while it answers, the answer goes on from another one, or from the same
    when it is back, with the very tokens that it would have had; it is given up after
    `resume_for_s`, or at once if that is 0. Every method, and every stream while it is read, raises
    KvrelayError.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        certificates: Path | None = None,
        resume_for_s: float = DEFAULT_RESUME_S,
    ) -> None:
        servers = Servers(address, timeout_s, api_key, certificates, grpc)
        super().__init__(servers, timeout_s, resume_for_s, Stream)

    def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = tokenize_request(text, model)
        return tokens_from(self._call("Tokenize", request))

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return models_from(self._call("ListModels", pb.ListModelsRequest()))

    def _call(self, method: str, request: Any) -> Any:
        """What the first server says that can be asked."""
        for server in (turns := self._servers.in_turn()):
            try:
                with self._servers.peer(server).explaining():
                    return self._servers.call(server, method, request)
            except KvrelayError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or server == turns[-1]:
                    raise
        raise AssertionError("there is no server")

    def close(self) -> None:
        """Cancels what is running and hangs up."""
        for channel in self._servers.channels:
            channel.close()

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
        resume_for_s: float = DEFAULT_RESUME_S,
    ) -> None:
        servers = Servers(address, timeout_s, api_key, certificates, grpc.aio)
        super().__init__(servers, timeout_s, resume_for_s, AsyncStream)

    async def tokenize(self, text: str, *, model: str = "") -> Tokens:
        """Cuts `text` into the model's tokens, with no chat template around it."""
        request = tokenize_request(text, model)
        return tokens_from(await self._call("Tokenize", request))

    async def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return models_from(await self._call("ListModels", pb.ListModelsRequest()))

    async def _call(self, method: str, request: Any) -> Any:
        """What the first server says that can be asked."""
        for server in (turns := self._servers.in_turn()):
            try:
                with self._servers.peer(server).explaining():
                    return await self._servers.call(server, method, request)
            except KvrelayError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or server == turns[-1]:
                    raise
        raise AssertionError("there is no server")

    async def close(self) -> None:
        """Cancels what is running and hangs up."""
        for channel in self._servers.channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
