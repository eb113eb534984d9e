"""Turns bytes that are not the message a method takes into INVALID_ARGUMENT.

By itself gRPC answers INTERNAL, as if the server had failed; invalid UTF-8 in a prompt is the
usual case. Installed by router/main.py on the public server.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router.field_count import has_more_fields

_NO_MESSAGE = "the request is not a valid protobuf message; is all text in it valid UTF-8?"
_FIELDS_MAX = 12_000  # far more than any request may have, and parsed in a millisecond
_TOO_MANY = f"the request: more than {_FIELDS_MAX} fields; does it have too many messages?"
_SMALL_BYTES = 64 << 10  # there, parsing takes no longer than counting


@dataclass(frozen=True)
class _Malformed:
    """Stands in for a request that could not be read."""

    why: str


class MalformedRequests(grpc.aio.ServerInterceptor):
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        make, serve = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        if handler.response_streaming:
            make, serve = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        read = _forgiving(handler.request_deserializer)
        return make(_checked(serve), read, handler.response_serializer)


def _forgiving(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def forgiving(data: bytes) -> Any:
        if len(data) > _SMALL_BYTES and has_more_fields(data, _FIELDS_MAX):
            return _Malformed(_TOO_MANY)
        try:
            return read(data)
        except DecodeError:
            return _Malformed(_NO_MESSAGE)

    return forgiving


def _checked(serve: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """For handlers that are coroutines, which all of the public server's unary ones are."""

    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.why)
        return await serve(request, context)

    return checked
