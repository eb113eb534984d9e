"""One request from the client's words to its answer, whatever protocol the client speaks.

Made by router/main.py; called by the gRPC service and the HTTP routes. It checks, renders,
tokenizes, submits, and lets go of the request however its serving ends, the client's going away
included.
"""

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tokenizers import Tokenizer

from kvrelay.wire.inference_pb2 import Delta, Finished, SamplingParams
from router.admission import (
    DEFAULT_LIMITS,
    InvalidRequest,
    check_messages,
    check_request_id,
    check_sampling,
    check_text,
    check_token_ids,
    check_urgency,
)
from router.answer import Answer
from router.answer_stream import AnswerStream
from router.callers import ANYBODY, Caller, Callers
from router.commands import Trouble
from router.detokenize import Detokenizer
from router.fleet import Fleet, now_ms
from router.metrics import Metrics
from router.model_files import ModelFiles
from router.quotas import Lease, Quotas
from router.refusals import Reason, Refusal, refusal
from router.request import Request, Times
from router.template_process import TemplateLimits, TemplateProcess

# Shorter texts are tokenized faster than a thread could be told to.
_INLINE_CHARS = 4096
_SHOWN_CHARS = 128  # of a model's name that a client made up
_TEXT_THREADS = 2  # for longer ones
_UNBOUNDED_TOKENS = 1 << 20
SHUTTING_DOWN = "the router is shutting down"

T = TypeVar("T")


@dataclass(frozen=True)
class Messages:
    """A chat, for the model's own template: (role, content), oldest first. Checked before it is
    copied: what a client sends may be far too long."""

    messages: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Ask:
    """What a client wants. Empty `model` and `request_id`: the one served, one we make up."""

    prompt: str | Sequence[int] | Messages
    sampling: SamplingParams
    model: str = ""
    request_id: str = ""
    priority: int = 0  # lower goes first
    ttft_deadline_ms: int = 0  # 0: none
    protocol: Literal["grpc", "http"] = "grpc"  # it came by; for the metrics


class Served:
    """An accepted request and its answer."""

    def __init__(
        self, request: Request, answer: Answer, detokenizer: Detokenizer, metrics: Metrics
    ) -> None:
        self.request = request
        self._answer = answer
        self._stream = AnswerStream(request, detokenizer)
        self._metrics = metrics
        self._last_ms: float | None = None  # when the newest tokens left
        self._ended = False

    @property
    def finished(self) -> Finished | None:
        return self._stream.finished

    async def next(self) -> Delta | Finished | None:
        """What comes next; after Finished, None.

        Raises:
            Refusal: it cannot be finished.
        """
        while self._stream.finished is None:
            try:
                event = await self._answer.next()
            except Trouble:
                with refusals():  # here, not around: nearly all events are tokens
                    raise
            delta = self._stream.on(event)
            if delta is not None:
                self._count(len(delta.token_ids))
                return delta
        if self._ended:
            return None
        self._ended = True
        return self._stream.finished

    def _count(self, tokens: int) -> None:
        if tokens:
            now, last = now_ms(), self._last_ms
            self._metrics.generated(tokens, None if last is None else now - last)
            self._last_ms = now


class FrontDoor:
    def __init__(
        self,
        files: ModelFiles,
        fleet: Fleet,
        callers: Callers,
        template_limits: TemplateLimits = TemplateLimits(),  # noqa: B008  # frozen
    ) -> None:
        self.files = files
        self.callers = callers
        self.metrics = fleet.metrics
        self._fleet = fleet
        self._quotas = Quotas()
        self._detokenizer = Detokenizer(files.tokenizer)
        self._template = (
            TemplateProcess(files.chat_template, files.special_tokens, template_limits)
            if files.chat_template
            else None
        )
        self._texts = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="texts")
        self._draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.asynccontextmanager
    async def serve(self, ask: Ask, caller: Caller) -> AsyncIterator[Served]:
        """The answer to `ask`; leaving the context takes it back from the workers.

        Raises:
            Refusal: it is not served.
        """
        arrived_at_ms = now_ms()
        with self._counted(), contextlib.ExitStack() as stack:
            with self._refusals_counted(ask.protocol):
                leased = stack.enter_context(self._leased(caller, arrived_at_ms))
                request = await self._checked(ask, caller, arrived_at_ms)
                leased.reserve(request)
            outcome: Reason | Finished | None = None
            try:
                with refusals():
                    answer = self._fleet.submit(request)
                served = Served(request, answer, self._detokenizer, self.metrics)
                yield served
                outcome = served.finished
            except Refusal as error:
                outcome = error.reason
                raise
            finally:
                self._fleet.let_go(request)
                self.metrics.ended(ask.protocol, outcome, request)

    async def _checked(self, ask: Ask, caller: Caller, arrived_at_ms: float) -> Request:
        """The request that `ask` makes."""
        if self._draining:
            raise Refusal(Reason.UNAVAILABLE, SHUTTING_DOWN)
        check_request_id(ask.request_id)
        check_urgency(ask.priority, ask.ttft_deadline_ms)
        self.check_model(ask.model)
        return self._request(ask, caller, await self._prompt(ask.prompt), arrived_at_ms)

    @contextlib.contextmanager
    def _refusals_counted(self, protocol: str) -> Iterator[None]:
        """Refusals of what has not become a request; those of requests are counted at their end."""
        try:
            with refusals():
                yield
        except Refusal as error:
            self.metrics.refused(protocol, error.reason)
            raise

    async def tokenize(self, model: str, text: str, caller: Caller = ANYBODY) -> list[int]:
        """The ids of `text` as a prompt, a request of the caller's quota; raises Refusal."""
        with self._leased(caller, now_ms()), refusals():
            self.check_model(model)
            return await self._tokenize(text, add_special_tokens=True)

    def check_model(self, name: str) -> None:
        """Raises Refusal for a model that is not served."""
        if name and name != self.files.name:
            raise Refusal(
                Reason.NOT_FOUND,
                f"model {name[:_SHOWN_CHARS]!r} is not served here; {self.files.name!r} is",
            )

    @property
    def not_ready(self) -> str:
        """Why no request can be served now; empty when one can."""
        return SHUTTING_DOWN if self._draining else self._fleet.not_ready

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt and answer together."""
        limits = (self.files.max_position_embeddings, self._fleet.dispatcher.context_tokens)
        return min((limit for limit in limits if limit is not None), default=_UNBOUNDED_TOKENS)

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when none is running."""
        self._draining = True
        await self._idle.wait()

    async def open(self) -> None:
        """Raises ChatTemplateError for a template that is none."""
        if self._template is not None:
            await self._template.start()

    async def close(self) -> None:
        if self._template is not None:
            await self._template.close()
        self._texts.shutdown(wait=False, cancel_futures=True)

    # ---- from words to tokens

    async def _prompt(self, prompt: str | Sequence[int] | Messages) -> Sequence[int]:
        if isinstance(prompt, str):
            return await self._tokenize(prompt, add_special_tokens=True)
        if not isinstance(prompt, Messages):
            check_token_ids(
                prompt, vocab_size=self.files.vocab_size, max_model_tokens=self.max_model_tokens
            )
            return list(prompt)
        if self._template is None:
            raise Refusal(
                Reason.UNSUPPORTED,
                f"model {self.files.name!r} has no chat template: send a prompt instead "
                "(Generate, /v1/completions)",
            )
        check_messages(prompt.messages, DEFAULT_LIMITS)
        text = await self._template.render(list(prompt.messages))
        # The template writes the special tokens itself.
        return await self._tokenize(text, add_special_tokens=False)

    async def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        check_text(
            text,
            max_model_tokens=self.max_model_tokens,
            longest_token_bytes=self.files.longest_token_bytes,
            limits=DEFAULT_LIMITS,
        )
        tokenizer = self.files.tokenizer
        ids = await self._off_loop(len(text), _encode, tokenizer, text, add_special_tokens)
        if not ids:
            raise InvalidRequest("text: no token comes of it")
        return ids

    async def _off_loop(self, size: int, work: Callable[..., T], *args: Any) -> T:
        """Runs what may take long on a thread, so that nobody's stream waits for it."""
        if size <= _INLINE_CHARS:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._texts, work, *args)

    def _request(
        self, ask: Ask, caller: Caller, prompt: Sequence[int], arrived_at_ms: float
    ) -> Request:
        sampling = check_sampling(
            ask.sampling,
            eos_token_ids=self.files.eos_token_ids,
            vocab_size=self.files.vocab_size,
            prompt_tokens=len(prompt),
            max_model_tokens=self.max_model_tokens,
            limits=DEFAULT_LIMITS,
            draw_seed=lambda: secrets.randbits(64),
        )
        return Request(
            request_id=ask.request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt,
            sampling=sampling,
            times=Times(arrived_at_ms=arrived_at_ms),
            tenant=caller.tenant,
            priority=ask.priority,
            ttft_deadline_ms=ask.ttft_deadline_ms,
        )

    @contextlib.contextmanager
    def _leased(self, caller: Caller, arrived_at_ms: float) -> "Iterator[_Leased]":
        """A request's part of its caller's quota, given back at the end; raises Refusal."""
        with refusals():
            lease = self._quotas.enter(caller.name, caller.quota, arrived_at_ms)
        leased = _Leased(self._quotas, lease)
        try:
            yield leased
        finally:
            self._quotas.end(lease, leased.used_tokens, now_ms())

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


class _Leased:
    """A lease, and the request whose tokens are reserved in it."""

    def __init__(self, quotas: Quotas, lease: Lease) -> None:
        self._quotas = quotas
        self._lease = lease
        self._request: Request | None = None

    def reserve(self, request: Request) -> None:
        """Raises QuotaExceededError or BeyondQuotaError."""
        tokens = len(request.prompt), request.sampling.max_tokens
        self._quotas.reserve(self._lease, *tokens, now_ms())
        self._request = request

    @property
    def used_tokens(self) -> int:
        """A request that no worker has begun has used none."""
        request = self._request
        if request is None or request.times.prefill_began_at_ms is None:
            return 0
        return request.prompt_tokens_now


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever the client is to be told leaves as a Refusal."""
    try:
        yield
    except Exception as error:
        told = refusal(error)
        if told is None or told is error:
            raise
        raise told from error


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
