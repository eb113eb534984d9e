"""One request over gRPC or HTTP, as a client with several routers asks it.

Called by load.py. What a lost router, or one that refuses for now, costs is noted in the stream;
what ends a request without its answer is a LostError.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from cluster.chaos.answers import Answer
from cluster.chaos.asks import Ask
from cluster.chaos.http_stream import (
    AnswerFailedError,
    Piece,
    RefusedError,
    RouterLostError,
    pieces,
)
from cluster.chaos.streams import Stream
from kvrelay.client import AsyncClient, AsyncStream, KvrelayError

ANSWER_S = 90.0  # for one answer, with all that happens meanwhile
_LOST_PAUSE_S = 0.1  # before a request whose router was lost is asked again
_REFUSED_PAUSE_S = 0.5  # where the refusal says nothing

Came = Callable[[Stream, int], None]  # so many tokens have come for it


class LostError(Exception):
    """The request ended without its answer."""


class Asking:
    """The clients. `came` hears of tokens as they come."""

    def __init__(self, grpc_addresses: Sequence[str], http_addresses: Sequence[str]) -> None:
        self.came: Came = lambda stream, tokens: None
        self._http = list(http_addresses)
        # Each client begins with another router.
        self._clients = [
            AsyncClient(",".join((*grpc_addresses[at:], *grpc_addresses[:at])))
            for at in range(len(grpc_addresses))
        ]

    @property
    def client(self) -> AsyncClient:
        return self._clients[0]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def ask(self, ask: Ask, stream: Stream, request_id: str, enough: int) -> Answer:
        """Cancels the request when so many tokens have come; over HTTP, so many pieces of text.

        Raises LostError.
        """
        over = self._over_http if ask.over == "http" else self._over_grpc
        try:
            async with asyncio.timeout(ANSWER_S):
                return await over(ask, stream, request_id, enough)
        except TimeoutError:
            raise LostError(f"no answer within {ANSWER_S:g} s") from None

    async def reference(self, ask: Ask, request_id: str) -> Answer:
        """The whole answer, over gRPC: whatever the protocol, it is the same."""
        return await self._over_grpc(ask, Stream(0, ask.number, 0.0), request_id, 1 << 31)

    # ---- gRPC

    async def _over_grpc(self, ask: Ask, stream: Stream, request_id: str, enough: int) -> Answer:
        client = self._clients[stream.number % len(self._clients)]
        while True:
            method: Any = client.chat if ask.chat else client.generate
            call = method(ask.prompt, timeout_s=ANSWER_S, request_id=request_id, **ask.options)
            try:
                return await self._read(call, stream, enough)
            except KvrelayError as error:
                if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise LostError(f"{error.code.name}: {error}") from error
                if stream.tokens:
                    raise LostError(f"refused after {stream.tokens} tokens: {error}") from error
                stream.refused += 1
                retry_ms = error.retry_ms
                await asyncio.sleep(_REFUSED_PAUSE_S if retry_ms is None else retry_ms / 1000)

    async def _read(self, call: AsyncStream, stream: Stream, enough: int) -> Answer:
        token_ids: list[int] = []
        texts: list[str] = []
        async with call:
            async for delta in call.deltas():
                token_ids += delta.token_ids
                texts.append(delta.text)
                if delta.token_ids:
                    self.came(stream, len(delta.token_ids))
                if len(token_ids) >= enough:
                    return Answer("".join(texts), tuple(token_ids), "", cut=True)
            whole = await call.result()
            stream.resumed += whole.resumed
        return Answer(whole.text, whole.token_ids, whole.finish_reason)

    # ---- HTTP

    async def _over_http(self, ask: Ask, stream: Stream, request_id: str, enough: int) -> Answer:
        at = stream.number
        while True:
            address = self._http[at % len(self._http)]
            try:
                async with contextlib.aclosing(_pieces(address, ask)) as answer:
                    return await self._gather(answer, stream, enough)
            except RouterLostError:
                # No router can go on with an answer of HTTP: the request is asked again, whole.
                stream.asked_again += 1
                at += 1
                await asyncio.sleep(_LOST_PAUSE_S)
            except RefusedError as error:
                stream.refused += 1
                await asyncio.sleep(error.retry_s)
            except AnswerFailedError as error:
                raise LostError(str(error)) from error

    async def _gather(self, answer: AsyncIterator[Piece], stream: Stream, enough: int) -> Answer:
        texts: list[str] = []
        finish_reason = ""
        async for piece in answer:
            finish_reason = piece.finish_reason or finish_reason
            if piece.text:
                texts.append(piece.text)
                self.came(stream, 1)
            if len(texts) >= enough and not finish_reason:
                return Answer("".join(texts), None, "", cut=True)
        return Answer("".join(texts), None, finish_reason)


def _pieces(address: str, ask: Ask) -> Any:
    if ask.chat:
        body = {"messages": [{"role": "user", "content": ask.prompt}]}
        return pieces(address, "/v1/chat/completions", {**body, **ask.options})
    return pieces(address, "/v1/completions", {"prompt": ask.prompt, **ask.options})


def now_s() -> float:
    """The clock that all processes of a host share."""
    return time.monotonic()
