"""Turns bytes that are not the message a method takes into INVALID_ARGUMENT.

By itself gRPC answers INTERNAL, as if the server had failed; invalid UTF-8 in a prompt is the
usual case. Installed by router/main.py on the public server.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

_MESSAGE = "the request is not a valid protobuf message; is all text in it valid UTF-8?"


class _Malformed:
    """Stands in for a request that could not be read."""


class MalformedRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        read = _forgiving(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _checked_stream(handler.unary_stream), read, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _checked(handler.unary_unary), read, handler.response_serializer
        )


def _forgiving(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def forgiving(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _Malformed()

    return forgiving


def _checked(serve: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _MESSAGE)
        return await serve(request, context)

    return checked


def _checked_stream(
    serve: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def checked(request: Any, context: Any) -> AsyncIterator[Any]:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _MESSAGE)
        async for response in serve(request, context):
            yield response

    return checked
