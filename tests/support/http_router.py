"""The router's HTTP side on a real socket, over a fleet that answers what a test tells it to."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from byte_tokenizer import byte_level_tokenizer
from router_cases import router_config

from router.answer import Answer, ReadingTurns
from router.callers import Callers
from router.commands import Trouble
from router.frontdoor import FrontDoor
from router.http.app import make_app
from router.http.server import HttpServer
from router.metrics import Metrics
from router.model_files import ModelFiles
from router.request import Ending, Request
from router.workers import Workers

Event = list[int] | Ending | Trouble
Script = Callable[[Request], Sequence[Event]]


def says(text: str, ending: Ending = Ending.LENGTH) -> list[Event]:
    """The answer `text`, a byte for each token."""
    return [*([byte] for byte in text.encode()), ending]


@dataclass
class _Limits:
    context_tokens: int = 1000


class ScriptedAnswer(Answer):
    """A new event of the script whenever its reader has had all; other events can be put, too."""

    def __init__(self, turns: ReadingTurns, script: Iterable[Event]) -> None:
        super().__init__(turns)
        self._script = iter(script)

    async def next(self) -> list[int] | Ending:
        if not self._tokens and self._end is None:
            event = next(self._script, None)
            if event is not None:
                self.put(event)
        return await super().next()


class ScriptedFleet:
    """Stands in for a Fleet. `script` says what a request is answered; None: the test puts it."""

    def __init__(self, script: Script | None) -> None:
        self.metrics = Metrics()
        self.dispatcher = _Limits()
        self.not_ready = ""
        self.asked: asyncio.Queue[tuple[Request, Answer]] = asyncio.Queue()
        self.let_go_of: asyncio.Queue[Request] = asyncio.Queue()
        self.refuse_with: Exception | None = None
        self.requests = (0, 0)
        self.workers = Workers(router_config())
        self._script = script
        self._turns = ReadingTurns()
        self._held: set[Request] = set()

    def submit(self, request: Request) -> Answer:
        if self.refuse_with is not None:
            raise self.refuse_with
        events = self._script(request) if self._script else ()
        answer = ScriptedAnswer(self._turns, events)
        self._held.add(request)
        for event in events:
            if isinstance(event, list):
                request.log(len(request.answer), event, request.times.arrived_at_ms + 1)
        self.asked.put_nowait((request, answer))
        return answer

    def let_go(self, request: Request, answer: Answer, *, resumable: bool = False) -> None:
        if request in self._held:
            self._held.remove(request)
            self.let_go_of.put_nowait(request)

    def connected(self, role: str) -> int:
        return 1


@dataclass
class HttpRouter:
    server: HttpServer
    fleet: ScriptedFleet
    door: FrontDoor
    client: httpx2.AsyncClient
    opened: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def connections(self) -> int:
        return len(self.server._server.server_state.connections)

    async def chat(self, **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hi"}]
        return await self.client.post("/v1/chat/completions", json={"messages": messages, **body})

    async def complete(self, **body: Any) -> httpx2.Response:
        return await self.client.post("/v1/completions", json={"prompt": "hi", **body})

    def close(self) -> None:
        for writer in self.opened:
            writer.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection; closed with the router."""
        host, port = self.server.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        self.opened.append(writer)
        return reader, writer


def tiny_files(**changes: Any) -> ModelFiles:
    tokenizer = byte_level_tokenizer()
    fields: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 1000,
        "eos_token_ids": (),
        "tokenizer": tokenizer,
        "chat_template": "{{ messages[0].content }}",
        "special_tokens": {},
        "longest_token_bytes": 100,
    }
    return ModelFiles(**{**fields, **changes})


@contextlib.asynccontextmanager
async def http_router(
    script: Script | None = None,
    *,
    callers: Callers | None = None,
    files: ModelFiles | None = None,
    tls: ssl.SSLContext | None = None,
    **config: Any,
) -> AsyncIterator[HttpRouter]:
    """A router that serves HTTP; at the end it has let go of all that it asked for."""
    settings = router_config(**config)
    fleet = ScriptedFleet(script)
    fleet.metrics.watch(fleet)
    door = FrontDoor(files or tiny_files(), fleet, callers or Callers())
    server = HttpServer(make_app(door, fleet.metrics, settings), settings, tls)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(door.close)
        await server.start()
        stack.push_async_callback(server.stop)
        client = httpx2.AsyncClient(base_url=f"http://{server.address}", timeout=30)
        router = HttpRouter(server, fleet, door, await stack.enter_async_context(client))
        stack.callback(router.close)
        yield router
    assert not fleet._held
