"""Owns how HTTP clients are told what went wrong: OpenAI's error object and its status.

Refusals of the front door become an HttpError here; the routes and the gate raise others.
"""

import math
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from router.refusals import Reason, Refusal

INVALID = "invalid_request_error"
SERVER = "server_error"
RATE_LIMIT = "rate_limit_error"
INTERNAL_MESSAGE = "the router failed; its log has the reason"

# A message about a field begins with the field: "stop[2]: empty, needs at least one character".
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")
# What the front door calls a prompt, by the form that it has.
_PROMPT_FIELD = re.compile(r"^(?:text|token_ids|prompt)(?=[:\[])")


@dataclass(frozen=True)
class _Kind:
    """The status of a Refusal, and the type and code of its error object."""

    status: HTTPStatus
    type: str
    code: str | None = None


KINDS = {
    Reason.INVALID: _Kind(HTTPStatus.BAD_REQUEST, INVALID),
    Reason.TOO_LONG: _Kind(HTTPStatus.BAD_REQUEST, INVALID, "context_length_exceeded"),
    Reason.UNAUTHENTICATED: _Kind(HTTPStatus.UNAUTHORIZED, INVALID, "invalid_api_key"),
    Reason.FORBIDDEN: _Kind(HTTPStatus.FORBIDDEN, INVALID, "forbidden"),
    Reason.NOT_FOUND: _Kind(HTTPStatus.NOT_FOUND, INVALID, "model_not_found"),
    Reason.UNSUPPORTED: _Kind(HTTPStatus.BAD_REQUEST, INVALID, "unsupported"),
    Reason.DUPLICATE: _Kind(HTTPStatus.CONFLICT, INVALID, "duplicate_request_id"),
    Reason.TAKEN_OVER: _Kind(HTTPStatus.CONFLICT, INVALID, "taken_over"),
    Reason.EXHAUSTED: _Kind(HTTPStatus.TOO_MANY_REQUESTS, RATE_LIMIT, "rate_limit_exceeded"),
    Reason.UNAVAILABLE: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, SERVER, "unavailable"),
    Reason.LEAVING: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, SERVER, "unavailable"),
    Reason.POISON: _Kind(HTTPStatus.INTERNAL_SERVER_ERROR, SERVER, "poison"),
}


@dataclass(eq=False)
class HttpError(Exception):
    """A request that is not served; the message is for the client."""

    status: HTTPStatus
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, code: str | None = None) -> HttpError:
    """A request that can never be served; `message` begins with the field, if it is about one."""
    return HttpError(HTTPStatus.BAD_REQUEST, message, param=_param(message), code=code)


def unknown_url(path: str) -> HttpError:
    message = f"there is no {path!r} here; /openapi.json lists what there is"
    return HttpError(HTTPStatus.NOT_FOUND, message, code="unknown_url")


def unavailable(message: str, code: str, retry_ms: int) -> HttpError:
    """It may be served later."""
    headers = _retry_headers(retry_ms)
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, message, SERVER, code=code, headers=headers)


def overloaded(message: str, retry_ms: int) -> HttpError:
    """No room for one more call or connection."""
    return unavailable(message, "overloaded", retry_ms)


def internal() -> HttpError:
    return HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_MESSAGE, SERVER, code="internal")


def of_refusal(refusal: Refusal, prompt_field: str = "prompt") -> HttpError:
    """prompt_field: what the route calls the prompt."""
    kind = KINDS[refusal.reason]
    if refusal.prompt is not None:
        prompt_field = f"{prompt_field}[{refusal.prompt}]"
    message = _PROMPT_FIELD.sub(prompt_field, str(refusal), count=1)
    headers = {} if refusal.retry_ms is None else _retry_headers(refusal.retry_ms)
    if kind.status is HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    param = _param(message) if kind.status is HTTPStatus.BAD_REQUEST else None
    if refusal.reason is Reason.NOT_FOUND:
        param = "model"
    return HttpError(kind.status, message, kind.type, param, kind.code, headers)


def _param(message: str) -> str | None:
    found = _FIELD.match(message)
    return found[1] if found else None


def _retry_headers(retry_ms: int) -> dict[str, str]:
    """retry-after-ms is OpenAI's, whose clients look at it first."""
    return {"retry-after": str(math.ceil(retry_ms / 1000)), "retry-after-ms": str(retry_ms)}
