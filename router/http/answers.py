"""Owns the sending of an answer: whole, or as server-sent events while it is made.

Both are what a route returns for Starlette to call. A client that goes away takes its requests back
from the workers at once, whether it streams or waits.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvrelay.wire.inference_pb2 import Delta, Finished
from router.ask import Ask
from router.callers import Caller
from router.frontdoor import FrontDoor
from router.http.bodies import Body
from router.http.choices import serve_choices
from router.http.errors import HttpError, internal, of_refusal
from router.http.replies import Form, Tally, WholeAnswer, finish_reason
from router.refusals import Refusal
from router.served import Served

log = logging.getLogger(__name__)

_EVENTS_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]


@dataclass(frozen=True)
class Call:
    """One call that was understood."""

    asks: Sequence[Ask]
    body: Body
    caller: Caller
    form: Form

    @property
    def prompt_field(self) -> str:
        return "messages" if self.form.chat else "prompt"


class WholeReply:
    """Answers when all choices have ended."""

    def __init__(self, door: FrontDoor, call: Call) -> None:
        self._door = door
        self._call = call
        self._answers: dict[int, WholeAnswer] = {}
        self._tally = Tally(call.body.choices)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        served = serve_choices(self._door, call.asks, call.caller, self._take)
        try:
            await while_connected(receive, served)
        except Refusal as error:
            raise of_refusal(error, call.prompt_field) from error
        whole = call.form.whole(self._answers, self._tally.usage())
        response = Response(whole.model_dump_json(), media_type="application/json")
        await response(scope, receive, send)

    async def _take(self, number: int, served: Served, event: Delta | Finished) -> None:
        answer = self._answers.get(number)
        if answer is None:
            answer = self._answers[number] = WholeAnswer()
            self._tally.begin(number, served)
        self._tally.add(number, event)
        if isinstance(event, Delta):
            answer.texts.append(event.text)
        else:
            answer.finish_reason = finish_reason(event)


class EventStream:
    """Sends each piece of text when it is there.

    The status waits for the first token: what is refused before it has a status of its own. After
    that an error is an event, and the last one.
    """

    def __init__(self, door: FrontDoor, call: Call) -> None:
        self._door = door
        self._call = call
        self._begun: set[int] = set()  # choices
        self._started = False
        self._tally = Tally(call.body.choices)
        options = call.body.stream_options
        self._usage_wanted = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._send: Send
        self._writing = asyncio.Lock()  # choices take turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            await while_connected(receive, self._serve())
        except Refusal as error:
            await self._fail(of_refusal(error, self._call.prompt_field))
        except ClientDisconnect:
            return
        except Exception:
            if not self._started:
                raise
            log.exception("a stream failed")
            await self._fail(internal())

    async def _serve(self) -> None:
        call = self._call
        await serve_choices(self._door, call.asks, call.caller, self._take)
        last = [b"[DONE]"]
        if self._usage_wanted:
            last.insert(0, _json(call.form.usage_chunk(self._tally.usage())))
        await self._write(last, more=False)

    async def _take(self, number: int, served: Served, event: Delta | Finished) -> None:
        chunks: list[dict[str, Any] | None] = []
        form = self._call.form
        if number not in self._begun:
            self._begun.add(number)
            self._tally.begin(number, served)
            chunks.append(form.begin_chunk(number))
        self._tally.add(number, event)
        if isinstance(event, Finished):
            chunks.append(form.end_chunk(number, finish_reason(event)))
        elif event.text:
            chunks.append(form.text_chunk(number, event.text))
        datas = [_json(self._with_usage(chunk)) for chunk in chunks if chunk is not None]
        if datas:
            await self._write(datas)

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if self._usage_always:
            chunk["usage"] = self._tally.usage().model_dump()
        elif self._usage_wanted:
            chunk["usage"] = None
        return chunk

    async def _fail(self, error: HttpError) -> None:
        if not self._started:
            raise error
        await self._write([_json(error.body)], more=False)

    async def _write(self, datas: Sequence[bytes], *, more: bool = True) -> None:
        """Returns when the connection has taken it, so nothing piles up for a slow reader.

        One that reads nothing for http_write_ms is cut off (router/http/connection.py).
        """
        body = b"".join(b"data: %b\n\n" % data for data in datas)
        async with self._writing:
            if not self._started:
                self._started = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _EVENTS_HEADERS}
                )
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does `work`, and gives it up when the client goes.

    Raises:
        ClientDisconnect: the client has gone.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait((working, gone))  # what the work held is let go of before we go on


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: dict[str, Any]) -> bytes:
    # ASCII: some clients take U+2028 for the end of a line.
    return json.dumps(value, separators=(",", ":")).encode()
