"""Owns the way from the bytes of a request to its body: limits first, then types."""

import asyncio
import reprlib
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from kvrelay.config import RouterConfig
from router.http.bodies import FORMS
from router.http.errors import HttpError, invalid
from router.http.shape import Shape, ShapeError

B = TypeVar("B", bound=BaseModel)

_SHOWN_CHARS = 80  # of a value that is wrong
_SHOWN = reprlib.Repr()  # looks at no more of a value than is shown
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 2 * _SHOWN_CHARS


async def read_body(request: Request, kind: type[B], config: RouterConfig) -> B:
    """The request's JSON body.

    Raises:
        HttpError: it is not JSON, too large, of too many things, too slow, or not what the route
            takes.
        ClientDisconnect: the client has gone.
    """
    _check_content_type(request.headers.get("content-type", ""))
    try:
        async with asyncio.timeout(config.http_read_ms / 1000):
            data = await _read(request, config.http_body_bytes_max)
    except TimeoutError:
        message = f"the body did not arrive within {config.http_read_ms} ms"
        raise HttpError(HTTPStatus.REQUEST_TIMEOUT, message, code="body_timeout") from None
    return parse(kind, data)


def parse(kind: type[B], data: bytes) -> B:
    """Raises HttpError for what is not JSON, or not of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise invalid(_in_words(first)) from None


def _check_content_type(value: str) -> None:
    if value.partition(";")[0].strip().lower() != "application/json":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON: send the header Content-Type: application/json",
            code="unsupported_media_type",
        )


async def _read(request: Request, bytes_max: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > bytes_max:
        raise _too_large(bytes_max)
    data = bytearray()
    shape = Shape()
    async for piece in request.stream():
        data += piece
        if len(data) > bytes_max:
            raise _too_large(bytes_max)
        try:
            shape.add(piece)
        except ShapeError as error:
            raise invalid(f"the body is too much: {error}", code="body_too_complex") from None
    return bytes(data)


def _too_large(bytes_max: int) -> HttpError:
    return HttpError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body is too large, at most {bytes_max} bytes are allowed",
        code="body_too_large",
    )


def _in_words(error: Any) -> str:
    """One line about a pydantic error: the field, what is wrong, what was given."""
    what = error["msg"][:1].lower() + error["msg"][1:]
    path = _path(error["loc"])
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {what.removeprefix('invalid JSON: ')}"
    if not path:
        return f"the body: {what}"
    if error["type"] == "missing":
        return f"{path}: missing, it is required"
    if error["type"] == "too_long":
        return f"{path}: too many, at most {error['ctx']['max_length']} allowed"
    given = _SHOWN.repr(error["input"]).encode("ascii", "backslashreplace").decode()
    if len(given) > _SHOWN_CHARS:
        given = f"{given[:_SHOWN_CHARS]}..."
    return f"{path}: {what}, given was {given}"


def _path(loc: tuple[str | int, ...]) -> str:
    """messages[0].content, without the names that unions give their members."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in FORMS:
            path += f".{part}" if path else part
    return path
