"""The public gRPC service: checks a request, submits it, streams its answer.

Run by router/main.py. Every way a handler can end, the client's going away included, lets go of
the request, which takes it back from the workers.
"""

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from tokenizers import Tokenizer

from kvrelay.wire import inference_pb2, inference_pb2_grpc
from kvrelay.wire.inference_pb2 import GenerateResponse
from router.admission import (
    DEFAULT_LIMITS,
    InvalidRequest,
    check_messages,
    check_request_id,
    check_sampling,
    check_text,
    check_token_ids,
)
from router.answer_stream import AnswerStream
from router.chat import ChatTemplate, ChatTemplateError
from router.commands import (
    DuplicateRequestError,
    ExhaustedTrouble,
    InvalidTrouble,
    QueueFullError,
    Trouble,
)
from router.detokenize import Detokenizer
from router.fleet import Answer, Fleet, now_ms
from router.model_files import ModelFiles
from router.request import Request, Times

RETRY_HINT_MS = 1000
# Shorter texts are tokenized faster than a thread could be told to.
_INLINE_CHARS = 4096
_TEXT_THREADS = 2  # for longer ones
_UNBOUNDED_TOKENS = 1 << 20

T = TypeVar("T")


class RefusalError(Exception):
    """A request that is not served, with the status its client gets."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, files: ModelFiles, fleet: Fleet) -> None:
        self._texts = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="texts")
        self._draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._files = files
        self._fleet = fleet
        self._detokenizer = Detokenizer(files.tokenizer)
        self._template = (
            ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None
        )

    # ---- RPCs

    # The streams write rather than yield: gRPC drops an async generator without closing it when a
    # call is cancelled, and letting go would wait for the garbage collector.

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        async def prompt() -> list[int]:
            if request.WhichOneof("prompt") == "token_ids":
                check_token_ids(
                    request.token_ids.ids,
                    vocab_size=self._files.vocab_size,
                    max_model_tokens=self._max_model_tokens(),
                )
                return list(request.token_ids.ids)
            self._check_text(request.text)
            return await self._tokenize(request.text, add_special_tokens=True)

        await self._serve(request, prompt, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> None:
        async def prompt() -> list[int]:
            if self._template is None:
                raise RefusalError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"model {self._files.name!r} has no chat template: use Generate",
                )
            messages = [(message.role, message.content) for message in request.messages]
            check_messages(messages, DEFAULT_LIMITS)
            size = sum(len(role) + len(content) for role, content in messages)
            text = await self._off_loop(size, self._template.render, messages)
            self._check_text(text)
            # The template writes the special tokens itself.
            return await self._tokenize(text, add_special_tokens=False)

        await self._serve(request, prompt, context)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        try:
            self._check_model(request.model)
            self._check_text(request.text)
            ids = await self._tokenize(request.text, add_special_tokens=True)
        except (RefusalError, InvalidRequest) as error:
            await _abort(context, error)
        tokens = [self._files.tokenizer.id_to_token(token) or "" for token in ids]
        return inference_pb2.TokenizeResponse(token_ids=ids, tokens=tokens)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        model = inference_pb2.Model(
            name=self._files.name,
            max_model_tokens=self._max_model_tokens(),
            vocab_size=self._files.vocab_size,
            has_chat_template=self._template is not None,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when none is running."""
        self._draining = True
        await self._idle.wait()

    def close(self) -> None:
        self._texts.shutdown(wait=False, cancel_futures=True)

    # ---- one request

    async def _serve(
        self,
        message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
        prompt: Callable[[], Any],
        context: Any,
    ) -> None:
        request: Request | None = None
        with self._counted():
            try:
                arrived_at_ms = now_ms()
                if self._draining:
                    raise RefusalError(grpc.StatusCode.UNAVAILABLE, "the router is shutting down")
                check_request_id(message.request_id)
                self._check_model(message.model)
                request = self._request(message, await prompt(), arrived_at_ms)
                answer = self._fleet.submit(request)
                await context.write(GenerateResponse(accepted=self._accepted(request)))
                await self._stream(request, answer, context)
            except (RefusalError, InvalidRequest, ChatTemplateError) as error:
                await _abort(context, error)
            except (DuplicateRequestError, QueueFullError, Trouble) as error:
                await _abort(context, error)
            finally:
                if request is not None:
                    self._fleet.let_go(request)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Whatever happens inside, `drain` waits for its end and no longer."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _stream(self, request: Request, answer: Answer, context: Any) -> None:
        stream = AnswerStream(request, self._detokenizer)
        while stream.finished is None:
            response = stream.on(await answer.next())
            if response is not None:
                await context.write(GenerateResponse(delta=response))
        await context.write(GenerateResponse(finished=stream.finished))

    def _request(
        self,
        message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
        prompt: Sequence[int],
        arrived_at_ms: float,
    ) -> Request:
        sampling = check_sampling(
            message.sampling,
            eos_token_ids=self._files.eos_token_ids,
            prompt_tokens=len(prompt),
            max_model_tokens=self._max_model_tokens(),
            limits=DEFAULT_LIMITS,
            draw_seed=lambda: secrets.randbits(64),
        )
        return Request(
            request_id=message.request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt,
            sampling=sampling,
            times=Times(arrived_at_ms=arrived_at_ms),
        )

    def _accepted(self, request: Request) -> inference_pb2.Accepted:
        return inference_pb2.Accepted(
            request_id=request.request_id,
            model=self._files.name,
            prompt_tokens=len(request.prompt),
            seed=request.sampling.seed,
        )

    # ---- checks

    def _check_model(self, name: str) -> None:
        if name and name != self._files.name:
            raise RefusalError(
                grpc.StatusCode.NOT_FOUND,
                f"model {name!r} is not served here; {self._files.name!r} is",
            )

    def _check_text(self, text: str) -> None:
        check_text(
            text,
            max_model_tokens=self._max_model_tokens(),
            longest_token_bytes=self._files.longest_token_bytes,
            limits=DEFAULT_LIMITS,
        )

    def _max_model_tokens(self) -> int:
        limits = (self._files.max_position_embeddings, self._fleet.dispatcher.context_tokens)
        return min((limit for limit in limits if limit is not None), default=_UNBOUNDED_TOKENS)

    async def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = await self._off_loop(
            len(text), _encode, self._files.tokenizer, text, add_special_tokens
        )
        if not ids:
            raise InvalidRequest("text: no token comes of it")
        return ids

    async def _off_loop(self, size: int, work: Callable[..., T], *args: Any) -> T:
        """Runs what may take long on a thread, so that nobody's stream waits for it."""
        if size <= _INLINE_CHARS:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._texts, work, *args)


async def _abort(context: Any, error: Exception) -> None:
    """Ends the call with the status that fits; always raises."""
    match error:
        case RefusalError(code=code):
            await context.abort(code, str(error))
        case InvalidRequest() | ChatTemplateError() | InvalidTrouble():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case DuplicateRequestError():
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        case QueueFullError() | ExhaustedTrouble():
            hint = (("grpc-retry-pushback-ms", str(RETRY_HINT_MS)),)
            message = f"{error}; try again in {RETRY_HINT_MS} ms"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message, hint)
        case _:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
