"""Owns the OpenAPI document: the routes, what they take and every status that they answer with."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.http.bodies import ChatBody, CompletionBody
from router.http.replies import ChatCompletion, Completion, ErrorReply, Health, Model, ModelList

_REF = "#/components/schemas/{model}"
_SCHEMAS: tuple[tuple[type[BaseModel], Any], ...] = (
    (ChatBody, "validation"),
    (CompletionBody, "validation"),
    (ChatCompletion, "serialization"),
    (Completion, "serialization"),
    (ErrorReply, "serialization"),
    (Health, "serialization"),
    (Model, "serialization"),
    (ModelList, "serialization"),
)
_ERRORS = {
    400: "The request can never be served as it is; the message names the field.",
    401: "The API key is missing or wrong.",
    403: "The API key may not do this.",
    404: "There is no such model or route.",
    405: "The route does not take this method.",
    408: "The body did not arrive in time.",
    409: "The request was resumed in another call.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "No room now, or over a limit of the key; Retry-After says when to try again.",
    431: "Too many headers.",
    500: "The router failed; or workers died of this request, which is not to be tried again.",
    503: "No workers, shutting down, or too many calls or connections.",
}
_EVERY = (400, 431, 500, 503)  # the connection's and the gate's
_KEYED = (*_EVERY, 401)
_RETRY_HEADERS = {
    "Retry-After": {"schema": {"type": "string"}, "description": "Seconds."},
    "retry-after-ms": {"schema": {"type": "string"}, "description": "Milliseconds."},
}


def document() -> dict[str, Any]:
    _, schemas = models_json_schema(_SCHEMAS, ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvrelay",
            "version": version("kvrelay"),
            "description": (
                "OpenAI's API for chat and text completions. A field that would change the answer"
                " and is not supported (tools, logprobs, response formats, ...) is refused with"
                " 400 when its value asks for something."
            ),
        },
        "paths": {
            "/v1/chat/completions": _answering("chat", ChatBody, ChatCompletion),
            "/v1/completions": _answering("completions", CompletionBody, Completion),
            "/v1/models": _get("models", "What is served.", ModelList, _KEYED),
            "/v1/models/{model}": _model(),
            "/health": _get("health", "The process answers.", Health, _EVERY),
            "/ready": _get("ready", "Requests can be served now.", Health, _EVERY),
            "/metrics": _other("metrics", "For Prometheus.", "text/plain", (403,)),
            "/openapi.json": _other("openapi", "This document.", "application/json"),
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _answering(name: str, body: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    events: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 has no schema for one event
    return {
        "post": {
            "operationId": name,
            "summary": "With `stream`, as server-sent events; errors after the first are events.",
            "parameters": [_REQUEST_ID],
            "requestBody": {"required": True, "content": _json(body)},
            "responses": {
                "200": {"description": "The answer.", "content": {**_json(reply), **events}},
                **_errors((*_KEYED, 404, 405, 408, 409, 413, 415, 429)),
            },
        }
    }


def _get(name: str, summary: str, reply: type[BaseModel], errors: Iterable[int]) -> dict[str, Any]:
    ok = {"description": summary, "content": _json(reply)}
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "responses": {"200": ok, **_errors((*errors, 405))},
        }
    }


def _model() -> dict[str, Any]:
    path = _get("model", "One model.", Model, (*_KEYED, 404))
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    path["get"]["parameters"] = [name]
    return path


def _other(name: str, summary: str, media_type: str, errors: Iterable[int] = ()) -> dict[str, Any]:
    ok = {"description": summary, "content": {media_type: {}}}
    responses = {"200": ok, **_errors((*_KEYED, *errors, 405))}
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _errors(statuses: Iterable[int]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for status in sorted(statuses):
        told[str(status)] = {"description": _ERRORS[status], "content": _json(ErrorReply)}
        if status in (429, 503):
            told[str(status)]["headers"] = _RETRY_HEADERS
    return told


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": (
        "Sent back with the answer: printable ASCII, at most 128 bytes; else one is made up."
    ),
    "schema": {"type": "string"},
}
