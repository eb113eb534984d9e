"""Refuses every call on the public gRPC port that comes without a good API key.

An interceptor, so that no method can be forgotten: a service that is added, or reflection, is
behind it from the start. Health checks alone are not. Installed by router/main.py.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from router.callers import Callers
from router.refusals import Refusal

_OPEN = f"/{health.SERVICE_NAME}/"


class KeyGuard(grpc.aio.ServerInterceptor):
    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        details: Any = handler_call_details
        if details.method.startswith(_OPEN):
            return await continuation(details)
        headers = dict(details.invocation_metadata or ())
        try:
            self._callers.identify(headers.get("authorization"))
        except Refusal as refusal:
            return _refusing(str(refusal))
        return await continuation(details)


def _refusing(message: str) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    # For methods of every kind: it waits for no message of the client.
    return grpc.stream_stream_rpc_method_handler(refuse)
