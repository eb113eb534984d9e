"""Owns the making of the HTTP application: routes, errors, and the gate in front of them."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from kvrelay.config import RouterConfig
from router.frontdoor import FrontDoor
from router.http.errors import INVALID, HttpError, internal, of_refusal, unknown_url
from router.http.gate import Gate
from router.http.routes import Routes
from router.metrics import Metrics
from router.refusals import Refusal


def make_app(door: FrontDoor, metrics: Metrics, config: RouterConfig) -> ASGIApp:
    app = Starlette(
        routes=Routes(door, config).all(),
        exception_handlers={
            HttpError: _told,
            Refusal: _refused,
            HTTPException: _not_here,
            ClientDisconnect: _nobody,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    return Gate(app, door, metrics, config)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return of_refusal(error).response()


async def _not_here(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not this method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path} does not take {method}; it takes {allowed}"
        headers = {"allow": allowed}
        told = HttpError(
            HTTPStatus.METHOD_NOT_ALLOWED, message, INVALID, None, "method_not_allowed", headers
        )
    else:
        told = unknown_url(path)
    return told.response()


async def _nobody(request: Request, error: Exception) -> Response:
    """The client has gone; what is sent to it goes nowhere."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return internal().response()
