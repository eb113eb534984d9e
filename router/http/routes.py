"""The routes: one method each. Who calls, and whether the call may come in at all, the gate has
settled (router/http/gate.py)."""

import time

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvrelay.config import RouterConfig
from router.frontdoor import FrontDoor
from router.http.answers import Call, EventStream, WholeReply
from router.http.asks import chat_ask, completion_asks
from router.http.bodies import ChatBody, CompletionBody
from router.http.document import document
from router.http.errors import unavailable
from router.http.reading import read_body
from router.http.replies import Form, Health, Model, ModelList
from router.refusals import RETRY_HINT_MS


class Routes:
    def __init__(self, door: FrontDoor, config: RouterConfig) -> None:
        self._door = door
        self._config = config
        self._started_at_s = int(time.time())
        self._document = document()

    def all(self) -> list[Route]:
        post, get = ["POST"], ["GET"]
        return [
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/", self.models, methods=get),
            Route("/v1/models/{model:path}", self.model, methods=get),
            Route("/health", self.health, methods=get),
            Route("/ready", self.ready, methods=get),
            Route("/metrics", self.metrics, methods=get),
            Route("/openapi.json", self.openapi, methods=get),
        ]

    async def chat(self, request: Request) -> WholeReply | EventStream:
        body = await read_body(request, ChatBody, self._config)
        asks = [chat_ask(body, request.state.request_id)]
        return self._answer(Call(asks, body, request.state.caller, self._form(request, chat=True)))

    async def completions(self, request: Request) -> WholeReply | EventStream:
        body = await read_body(request, CompletionBody, self._config)
        asks = completion_asks(body, request.state.request_id)
        return self._answer(Call(asks, body, request.state.caller, self._form(request, chat=False)))

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[self._model()]))

    async def model(self, request: Request) -> Response:
        self._door.check_model(request.path_params["model"])
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """The process answers."""
        return _json(Health())

    async def ready(self, request: Request) -> Response:
        """Requests can be served now."""
        why_not = self._door.not_ready
        if why_not:
            raise unavailable(why_not, "not_ready", RETRY_HINT_MS)
        return _json(Health())

    async def metrics(self, request: Request) -> Response:
        return Response(self._door.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    def _answer(self, call: Call) -> WholeReply | EventStream:
        return (EventStream if call.body.stream else WholeReply)(self._door, call)

    def _form(self, request: Request, *, chat: bool) -> Form:
        return Form(chat, request.state.request_id, int(time.time()), self._door.files.name)

    def _model(self) -> Model:
        door = self._door
        return Model(
            id=door.files.name, created=self._started_at_s, max_model_len=door.max_model_tokens
        )


def _json(reply: Model | ModelList | Health) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")
