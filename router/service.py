"""The public gRPC service: kvrelay.v1 in front of router/frontdoor.py.

Run by router/main.py.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

from kvrelay.wire import inference_pb2, inference_pb2_grpc
from kvrelay.wire.inference_pb2 import Delta, GenerateResponse
from router.admission import DEFAULT_LIMITS, InvalidRequest, check_message_count
from router.ask import Ask, Messages
from router.frontdoor import FrontDoor
from router.guard import CALLER
from router.refusals import Reason, Refusal
from router.request import Request
from router.served import Served

STATUSES = {
    Reason.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.DUPLICATE: grpc.StatusCode.ALREADY_EXISTS,
    Reason.TAKEN_OVER: grpc.StatusCode.ABORTED,
    Reason.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.LEAVING: grpc.StatusCode.UNAVAILABLE,
    Reason.POISON: grpc.StatusCode.INTERNAL,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, door: FrontDoor) -> None:
        self._door = door

    # The streams write rather than yield: gRPC drops an async generator without closing it when a
    # call is cancelled, and letting go would wait for the garbage collector.

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        by_ids = request.WhichOneof("prompt") == "token_ids"
        await self._serve(request, request.token_ids.ids if by_ids else request.text, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> None:
        try:
            check_message_count(len(request.messages), DEFAULT_LIMITS)  # before they are made
        except InvalidRequest as error:
            self._door.metrics.refused("grpc", Reason.INVALID)
            await _abort(context, Refusal(Reason.INVALID, str(error)))
        prompt = Messages([(message.role, message.content) for message in request.messages])
        await self._serve(request, prompt, context)

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Any) -> None:
        await self._answer(self._door.resume(request, CALLER.get()), context)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        try:
            ids, tokens = await self._door.tokenize(request.model, request.text, CALLER.get())
        except Refusal as error:
            await _abort(context, error)
        return inference_pb2.TokenizeResponse(token_ids=ids, tokens=tokens)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        model = inference_pb2.Model(
            name=self._door.files.name,
            max_model_tokens=self._door.max_model_tokens,
            vocab_size=self._door.files.vocab_size,
            has_chat_template=self._door.has_chat_template,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def _serve(
        self,
        message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
        prompt: str | Sequence[int] | Messages,
        context: Any,
    ) -> None:
        ask = Ask(
            prompt,
            message.sampling,
            model=message.model,
            request_id=message.request_id,
            priority=message.priority,
            ttft_deadline_ms=message.ttft_deadline_ms,
        )
        await self._answer(self._door.serve(ask, CALLER.get()), context)

    async def _answer(self, serving: AbstractAsyncContextManager[Served], context: Any) -> None:
        try:
            async with serving as served:
                await context.write(GenerateResponse(accepted=self._accepted(served.request)))
                while (event := await served.next()) is not None:
                    if isinstance(event, Delta):
                        await context.write(GenerateResponse(delta=event))
                    else:
                        await context.write(GenerateResponse(finished=event))
        except Refusal as error:
            await _abort(context, error)

    def _accepted(self, request: Request) -> inference_pb2.Accepted:
        return inference_pb2.Accepted(
            request_id=request.request_id,
            model=self._door.files.name,
            prompt_tokens=len(request.prompt),
            seed=request.sampling.seed,
            nonce=request.nonce,
        )


async def _abort(context: Any, refusal: Refusal) -> None:
    """Ends the call with the status that fits; always raises."""
    hint: tuple[tuple[str, str], ...] = ()
    if refusal.retry_ms is not None and refusal.reason is not Reason.LEAVING:  # that is a loss
        hint = (("grpc-retry-pushback-ms", str(refusal.retry_ms)),)
    await context.abort(STATUSES[refusal.reason], str(refusal), hint)
