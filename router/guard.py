"""Refuses every call on the public gRPC port that comes without a good API key.

An interceptor, so that no method can be forgotten: a service that is added, or reflection, is
behind it from the start. `Check` of the health service alone is not: a load balancer has no key.
`Watch` is: it has no end, and each one is a call of `rpcs_max`. Installed by router/main.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from grpc_health.v1 import health

from router.callers import Caller, Callers
from router.metrics import Metrics
from router.refusals import Refusal

OPEN = f"/{health.SERVICE_NAME}/Check"
# Who calls, for the handler that the guard has let the call through to.
CALLER: ContextVar[Caller] = ContextVar("caller")


class KeyGuard(grpc.aio.ServerInterceptor):
    """open_read_ms: how long a call that needs no key may take to send its message."""

    def __init__(self, callers: Callers, metrics: Metrics, open_read_ms: int) -> None:
        self._callers = callers
        self._metrics = metrics
        self._open_read_s = open_read_ms / 1000

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        details: Any = handler_call_details
        if details.method == OPEN:
            return _hurried(await continuation(details), self._open_read_s)
        headers = dict(details.invocation_metadata or ())
        try:
            CALLER.set(self._callers.identify(headers.get("authorization")))
        except Refusal as refusal:
            self._metrics.refused("grpc", refusal.reason)
            return _refusing(str(refusal))
        return await continuation(details)


def _refusing(message: str) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    # For methods of every kind: it waits for no message of the client.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _hurried(handler: Any, read_s: float) -> Any:
    """A unary method for strangers: one that never sends its message does not stay for ever."""

    async def serve(messages: AsyncIterator[Any], context: Any) -> Any:
        try:
            async with asyncio.timeout(read_s):
                message = await anext(aiter(messages))
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no message has come")
        return await handler.unary_unary(message, context)

    return grpc.stream_unary_rpc_method_handler(
        serve, handler.request_deserializer, handler.response_serializer
    )
