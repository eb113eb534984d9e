"""One request from the client's words to its answer, whatever protocol the client speaks.

Made by router/main.py; called by the gRPC service and the HTTP routes. It checks, submits, and lets
go of the request however its serving ends, the client's going away included.
"""

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvrelay.clock import now_ms
from kvrelay.wire.inference_pb2 import Finished, ResumeRequest
from router.admission import DEFAULT_LIMITS, check_request_id, check_sampling, check_urgency
from router.answer import Answer
from router.ask import Ask, choice_seed
from router.callers import ANYBODY, Caller, Callers
from router.detokenize import Detokenizer
from router.fleet import Fleet
from router.leases import RequestLease, leased, looking, of_begun, reserve_all
from router.model_files import ModelFiles
from router.prompts import Prompts
from router.quotas import Quotas
from router.refusals import Reason, Refusal
from router.request import Request, Times
from router.resumption import Resumption
from router.served import Served, refusals
from router.template_process import TemplateLimits

_SHOWN_CHARS = 128  # of a model's name that a client made up
_UNBOUNDED_TOKENS = 1 << 20
SHUTTING_DOWN = "the router is shutting down"


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that may be submitted, and what it holds of its key's quota."""

    request: Request
    lease: RequestLease
    protocol: str


class FrontDoor:
    def __init__(
        self,
        files: ModelFiles,
        fleet: Fleet,
        callers: Callers,
        template_limits: TemplateLimits = TemplateLimits(),  # noqa: B008  # frozen
        looks_max: int = 64,
    ) -> None:
        self.files = files
        self.callers = callers
        self.metrics = fleet.metrics
        self._fleet = fleet
        self._quotas = Quotas(looks_max)
        self._leases: dict[Request, RequestLease] = {}  # of those that are read
        self._detokenizer = Detokenizer(files.tokenizer)
        self._prompts = Prompts(files, lambda: self.max_model_tokens, template_limits)
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
        async with self.admit([ask], caller) as [admitted], self.submit(admitted) as served:
            yield served

    @contextlib.asynccontextmanager
    async def admit(self, asks: Sequence[Ask], caller: Caller) -> AsyncIterator[list[Admitted]]:
        """The choices of one call, ask by ask: all checked and within the caller's quota before
        any of them is submitted, so that no answer has begun when one is refused.

        Raises:
            Refusal: not all of them are served.
        """
        arrived_at_ms = now_ms()
        with self._counted(), contextlib.ExitStack() as stack:
            with self._refusals_counted(asks[0].protocol):
                count = sum(ask.answers for ask in asks)
                leases = stack.enter_context(leased(self._quotas, caller, count))
                choices = await self._all_checked(asks, caller, arrived_at_ms)
                reserve_all(leases, choices, caller)
            yield [
                Admitted(request, lease, asks[0].protocol)
                for request, lease in zip(choices, leases, strict=True)
            ]

    @contextlib.asynccontextmanager
    async def submit(self, admitted: Admitted) -> AsyncIterator[Served]:
        """Its answer; leaving the context takes it back from the workers.

        Raises:
            Refusal: it is not served.
        """
        with self._to_its_end(admitted, lambda: self._fleet.submit(admitted.request)) as served:
            yield served

    @contextlib.asynccontextmanager
    async def resume(self, asked: ResumeRequest, caller: Caller) -> AsyncIterator[Served]:
        """What is left of an answer whose client has lost its router; leaving the context takes it
        back from the workers.

        It counts as a request of the caller's quota, by which it was let in where it began. One
        that runs here goes on in the lease of the call that it is taken from.

        Raises:
            Refusal: it is not served; NOT_FOUND when nobody has it.
        """
        arrived_at_ms = now_ms()
        with self._counted():
            with self._refusals_counted("grpc"):
                if self.not_ready:
                    raise Refusal(Reason.UNAVAILABLE, self.not_ready)
                if not asked.request_id:
                    raise Refusal(Reason.INVALID, "request_id is needed: that of its Accepted")
                check_request_id(asked.request_id)
                wish = Resumption(
                    request_id=asked.request_id,
                    tenant=caller.tenant,
                    kept_at=asked.kept_at,
                    nonce=asked.nonce,
                    next_offset=asked.next_offset,
                    asked_at_ms=arrived_at_ms,
                )
                with looking(self._quotas, caller):
                    request, answer = await self._fleet.resume(wish)
            before = self._leases.get(request)
            lease = before.move() if before else of_begun(self._quotas, caller, request)
            resumed = Admitted(request, lease, "grpc")
            with self._to_its_end(resumed, lambda: answer, asked.next_offset) as served:
                yield served

    @contextlib.contextmanager
    def _to_its_end(
        self, admitted: Admitted, begin: Callable[[], Answer], first: int = 0
    ) -> Iterator[Served]:
        """What is begun in here is let go of at the end, and counted."""
        request, answer = admitted.request, None
        self._leases[request] = admitted.lease
        outcome: Reason | Finished | None = None
        try:
            with refusals():
                answer = begin()
            served = Served(request, answer, self._detokenizer, self.metrics, first)
            yield served
            outcome = served.finished
        except Refusal as error:
            outcome = error.reason
            raise
        finally:
            if answer is not None:
                resumable = admitted.protocol == "grpc"
                self._fleet.let_go(request, answer, resumable=resumable)
            admitted.lease.end()
            if self._leases.get(request) is admitted.lease:
                del self._leases[request]
            self.metrics.ended(admitted.protocol, outcome, request)

    async def _all_checked(
        self, asks: Sequence[Ask], caller: Caller, arrived_at_ms: float
    ) -> list[Request]:
        """A refusal says which of several prompts it is about."""
        choices: list[Request] = []
        for index, ask in enumerate(asks):
            try:
                with refusals():
                    choices += await self._checked(ask, caller, arrived_at_ms)
            except Refusal as error:
                if len(asks) > 1:
                    error.prompt = index
                raise
        return choices

    async def _checked(self, ask: Ask, caller: Caller, arrived_at_ms: float) -> list[Request]:
        """The requests that `ask` makes, one for each choice."""
        if self._draining:
            raise Refusal(Reason.UNAVAILABLE, SHUTTING_DOWN)
        check_request_id(ask.request_id)
        check_urgency(ask.priority, ask.ttft_deadline_ms, priority_min=caller.priority_min)
        self.check_model(ask.model)
        prompt = await self._prompts.tokens(ask.prompt)
        sampling = check_sampling(
            ask.sampling,
            eos_token_ids=self.files.eos_token_ids,
            vocab_size=self.files.vocab_size,
            prompt_tokens=len(prompt),
            max_model_tokens=self.max_model_tokens,
            limits=DEFAULT_LIMITS,
            draw_seed=lambda: secrets.randbits(64),
        )
        return [
            Request(
                request_id=(not index and ask.request_id) or f"req-{uuid.uuid4().hex}",
                prompt=prompt,
                sampling=replace(sampling, seed=choice_seed(sampling.seed, index)),
                times=Times(arrived_at_ms=arrived_at_ms),
                tenant=caller.tenant,
                priority=ask.priority,
                ttft_deadline_ms=ask.ttft_deadline_ms,
                nonce=secrets.randbits(64),
            )
            for index in range(ask.answers)
        ]

    @contextlib.contextmanager
    def _refusals_counted(self, protocol: str) -> Iterator[None]:
        """Refusals of what has not become a request; those of requests are counted at their end."""
        try:
            with refusals():
                yield
        except Refusal as error:
            self.metrics.refused(protocol, error.reason)
            raise

    async def tokenize(
        self, model: str, text: str, caller: Caller = ANYBODY
    ) -> tuple[list[int], list[str]]:
        """The ids of `text` as a prompt and their tokens, a request of the caller's quota.

        Raises:
            Refusal: there are none, or more than a prompt may have.
        """
        with refusals(), leased(self._quotas, caller, 1):
            self.check_model(model)
            return await self._prompts.tokenize(text)

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
        return self._prompts.has_chat_template

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
        await self._prompts.open()

    async def close(self) -> None:
        await self._prompts.close()

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
