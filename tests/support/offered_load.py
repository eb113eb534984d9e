"""Load on a router: as much as it takes, or so many requests a second whatever becomes of them."""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvrelay.client import KvrelayError


@dataclass
class Window:
    """What became of the requests of one window."""

    seconds: float = 0.0
    finished: int = 0
    refused: list[KvrelayError] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Finished requests per second."""
        return self.finished / self.seconds


class OfferedLoad:
    """ask: begins the n-th request; its stream."""

    def __init__(self, ask: Callable[[int], Any]) -> None:
        self._ask = ask
        self._numbers = itertools.count()
        self._window: Window | None = None

    async def closed(self, clients: int, seconds: float, warm_s: float) -> Window:
        """So many clients, each of which asks again as soon as it has its answer."""

        async def one_after_another() -> None:
            while True:
                await self._run(self._ask(next(self._numbers)))

        tasks = [asyncio.create_task(one_after_another()) for _ in range(clients)]
        try:
            return await self._measure(seconds, warm_s)
        finally:
            await _end(tasks)

    async def open(self, per_s: float, seconds: float, warm_s: float) -> Window:
        """So many requests a second, at even distances; none is asked for again."""
        tasks: set[asyncio.Task[None]] = set()

        async def arrive() -> None:
            started_s = time.monotonic()
            for number in itertools.count():
                await asyncio.sleep(started_s + number / per_s - time.monotonic())
                task = asyncio.create_task(self._run(self._ask(next(self._numbers))))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        arriving = asyncio.create_task(arrive())
        try:
            return await self._measure(seconds, warm_s)
        finally:
            await _end([arriving])
            await _end(list(tasks))

    async def _measure(self, seconds: float, warm_s: float) -> Window:
        await asyncio.sleep(warm_s)
        window = self._window = Window()
        started_s = time.monotonic()
        await asyncio.sleep(seconds)
        self._window, window.seconds = None, time.monotonic() - started_s
        return window

    async def _run(self, stream: Any) -> None:
        try:
            await stream.result()
        except KvrelayError as error:
            if self._window is not None:
                self._window.refused.append(error)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        else:
            if self._window is not None:
                self._window.finished += 1


async def _end(tasks: list["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
