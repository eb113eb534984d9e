"""Owns what is settled for every HTTP call before its route is looked at: how many there may be,
how large its head is, who calls, what the key may see, and the ids of the call and of its answer.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.config import RouterConfig
from router.admission import InvalidRequest, check_request_id
from router.callers import Caller
from router.frontdoor import SHUTTING_DOWN, FrontDoor
from router.http.errors import HttpError, of_refusal, overloaded, unknown_url
from router.metrics import Metrics
from router.refusals import RETRY_HINT_MS, Reason, Refusal

log = logging.getLogger(__name__)

# Answered without a key: a load balancer has none.
OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"
MODEL_PATH = "/v1/models/"
PATHS = OPEN_PATHS | {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    METRICS_PATH,
    "/openapi.json",
}


class Gate:
    """The ASGI application in front of the routes."""

    def __init__(
        self, app: ASGIApp, door: FrontDoor, metrics: Metrics, config: RouterConfig
    ) -> None:
        self._app = app
        self._door = door
        self._metrics = metrics
        self._config = config
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        # Two calls may well have one id of the client's, a trace's for example.
        request_id = f"req-{uuid.uuid4().hex}"
        echoed_id = _given_id(headers) or request_id
        route = route_of(scope["path"])

        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                self._metrics.http_responses.labels(route, str(message["status"])).inc()
                given = list(message["headers"])
                begun = True
                message = {**message, "headers": [*given, (b"x-request-id", echoed_id.encode())]}
            await send(message)

        try:
            with self._counted():
                self._check_head(scope)
                state = scope.setdefault("state", {})
                state["request_id"] = request_id
                if scope["path"] not in OPEN_PATHS:
                    state["caller"] = self._caller(scope["path"], headers)
                if not scope["path"].isprintable():
                    # To Starlette, a path with a line break at its end is the one without.
                    raise unknown_url(scope["path"])
                if echoed_id != request_id:
                    log.info("request %s: its client calls it %s", request_id, echoed_id)
                await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            # Only the server does this, at its end; what it would say of it is no answer of ours.
            if not begun:
                told = Refusal(Reason.UNAVAILABLE, SHUTTING_DOWN)
                await of_refusal(told).response()(scope, receive, answer)
        except Refusal as error:
            self._metrics.refused("http", error.reason)
            await of_refusal(error).response()(scope, receive, answer)
        except HttpError as error:
            await error.response()(scope, receive, answer)

    def _caller(self, path: str, headers: Mapping[bytes, str]) -> Caller:
        """Raises Refusal."""
        caller = self._door.callers.identify(headers.get(b"authorization"))
        if path == METRICS_PATH and not caller.metrics:
            # The counts are of all tenants: from their sums one could tell another's prompts.
            raise Refusal(
                Reason.FORBIDDEN,
                "this API key may not read the metrics: its entry needs `metrics = true`",
            )
        return caller

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._running >= self._config.http_requests_max:
            raise overloaded(f"{self._running} requests are under way", RETRY_HINT_MS)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _check_head(self, scope: Scope) -> None:
        most = self._config.http_headers_max
        if len(scope["headers"]) > most:
            raise HttpError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"{len(scope['headers'])} headers, at most {most} are allowed",
                code="too_many_headers",
            )


def route_of(path: str) -> str:
    """The route's path as its name in the metrics; all that is no route has one name."""
    if path in PATHS:
        return path
    return f"{MODEL_PATH}{{model}}" if path.startswith(MODEL_PATH) else "other"


def _given_id(headers: Mapping[bytes, str]) -> str:
    """The client's own for its call, where it is fit to be one; else empty."""
    given = headers.get(b"x-request-id", "")
    with contextlib.suppress(InvalidRequest):
        check_request_id(given)
        return given
    return ""
