"""Answers on their way: owns how a program reads one, and how it goes on when its server is lost.

Made by kvrelay/client.py, one for each request. kvrelay/resuming.py says whom to ask next,
kvrelay/answer.py folds what comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import grpc

from kvrelay.answer import Answer, Completion, Delta
from kvrelay.peer import CANCELLED, KvrelayError
from kvrelay.resuming import Ask, Resuming
from kvrelay.servers import Servers
from kvrelay.wire import inference_pb2 as pb


class _BaseStream:
    """What both streams do alike: cancel, keep the first failure, and begin calls."""

    def __init__(self, servers: Servers, resuming: Resuming, timeout_s: float) -> None:
        self._servers = servers
        self._resuming = resuming
        self._timeout_s = timeout_s
        self._ends_s = time.monotonic() + timeout_s
        self._answer = Answer()
        self._failure: KvrelayError | None = None
        self._cancelled = False
        self._begin(resuming.now)

    def cancel(self) -> None:
        """Ends the request here and at the server; without effect once it has ended."""
        self._cancelled = True
        self._woken.set()
        self._call.cancel()

    _woken: Any  # an Event of either kind, set by cancel

    def _begin(self, ask: Ask) -> None:
        peer = self._servers.peer(ask.server)
        self._peer = peer.within(self._timeout_s)
        left_s = max(0.0, self._ends_s - time.monotonic())
        self._call: Any = self._servers.call(ask.server, ask.method, ask.request, left_s)

    def _begin_again(self, ask: Ask) -> None:
        """After the wait that it asks for."""
        self._check()
        self._answer.reopen(anew=ask.anew)
        try:
            self._begin(ask)
        except KvrelayError as error:
            self._failure = error
            raise
        if self._cancelled:  # meanwhile, from another thread
            self._call.cancel()

    def _take(self, event: pb.GenerateResponse) -> Delta | None:
        delta = self._answer.take(event)
        if event.HasField("accepted"):
            self._servers.first = self._resuming.now.server
        self._resuming.heard(event, new=delta is not None or event.HasField("finished"))
        return delta

    def _check(self) -> None:
        """Raises what has ended the request before."""
        if self._failure is None and self._cancelled and not self._answer.ended:
            self._failure = KvrelayError(grpc.StatusCode.CANCELLED, CANCELLED)
        if self._failure is not None:
            raise self._failure

    def _after(self, error: KvrelayError) -> Ask:
        """The call to go on with after one that has failed, and is cancelled: it is no use. Raises
        the error when there is none."""
        self._call.cancel()
        ask = None
        if not self._cancelled:
            ask = self._resuming.failed(error, self._answer.next_offset, time.monotonic())
        if ask is None:
            self._failure = error
            raise error
        return ask


class Stream(_BaseStream):
    """One answer on its way: iterates over its text, piece by piece, as it comes.

    Use it in a `with` statement to have the request cancelled if the block is left early. Once it
    has failed, every later read raises the same KvrelayError.
    """

    def __init__(self, servers: Servers, resuming: Resuming, timeout_s: float) -> None:
        self._woken = threading.Event()
        super().__init__(servers, resuming, timeout_s)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (delta := self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """What is left of the answer as it came, with its tokens."""
        while (delta := self._next_delta()) is not None:
            yield delta

    def result(self) -> Completion:
        """Reads to the end; the completion holds also what was iterated over before."""
        while self._next_delta() is not None:
            pass
        return self._answer.completion(self._resuming.resumed)

    def _next_delta(self) -> Delta | None:
        while not self._answer.ended:
            if self._failure is not None:
                raise self._failure
            try:
                with self._peer.explaining():
                    for event in self._call:
                        if (delta := self._take(event)) is not None:
                            return delta
                    self._answer.end()
            except KvrelayError as error:
                ask = self._after(error)
                self._woken.wait(ask.wait_s)
                self._begin_again(ask)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncStream(_BaseStream):
    """`Stream` for asyncio. A task cancelled while it reads cancels the request as well."""

    def __init__(self, servers: Servers, resuming: Resuming, timeout_s: float) -> None:
        self._woken = asyncio.Event()
        super().__init__(servers, resuming, timeout_s)

    def _begin(self, ask: Ask) -> None:
        super()._begin(ask)
        self._events = aiter(self._call)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while (delta := await self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is left of the answer as it came, with its tokens."""
        while (delta := await self._next_delta()) is not None:
            yield delta

    async def result(self) -> Completion:
        """Reads to the end; the completion holds also what was iterated over before."""
        while await self._next_delta() is not None:
            pass
        return self._answer.completion(self._resuming.resumed)

    async def _next_delta(self) -> Delta | None:
        while not self._answer.ended:
            if self._failure is not None:
                raise self._failure
            try:
                with self._peer.explaining():
                    async for event in self._events:
                        if (delta := self._take(event)) is not None:
                            return delta
                    self._answer.end()
            except KvrelayError as error:
                ask = self._after(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ask.wait_s):
                        await self._woken.wait()
                self._begin_again(ask)
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
