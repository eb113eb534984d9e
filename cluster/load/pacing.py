"""Sends every request of a workload when it is due, whatever runs. Used by driver.py.

Nothing here waits for an answer before it sends. What makes a request late all the same (too many
connections, an event loop that is busy) is measured, not hidden.
"""

import asyncio
import contextlib
import time
from array import array
from collections import deque
from typing import Any

from cluster.load.reading import Reading
from cluster.load.targets import Failure, Opened
from cluster.workload.asks import Ask, Workload
from cluster.workload.outcomes import Outcome

_LEAD_S = 0.1  # from `begin` to the workload's beginning
_PREPARED_BYTES_MAX = 256 << 20  # of requests made before the load begins; later ones as it runs
_TICK_S = 0.02  # how often the loop is asked how late it is


class Pacing:
    """One run. `told` has what the server said of the first failure of each kind."""

    def __init__(
        self, opened: Opened, workload: Workload, connections_max: int, timeout_s: float
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.told: dict[str, str] = {}
        self.loop_late_ms = array("d")  # of each tick
        self.held = 0  # requests that waited for a connection
        self.sent = 0
        self.tokens = 0
        self._opened = opened
        self._asks = workload.asks
        self._timeout_s = timeout_s
        self._connections = asyncio.Semaphore(connections_max)
        self._prepared: deque[Any] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._start_s = 0.0
        self._work: tuple[asyncio.Task[None], ...] = ()
        self._arriving: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def is_done(self) -> bool:
        return self._arriving is not None and self._arriving.done() and not self._running

    def prepare(self) -> None:
        """As many requests as there is room for."""
        left = _PREPARED_BYTES_MAX
        for number, ask in enumerate(self._asks):
            self._prepared.append(self._opened.prepare(ask, number))
            left -= self._opened.size_of(self._prepared[-1])
            if left <= 0:
                return

    def begin(self) -> None:
        self._start_s = time.monotonic() + _LEAD_S
        self._arriving = asyncio.create_task(self._arrive())
        self._ticking = asyncio.create_task(self._tick())

    def clock(self) -> float:
        """Seconds since the workload's beginning."""
        return time.monotonic() - self._start_s

    def check(self) -> None:
        """Raises what has ended the sending: it is not to end."""
        if self._arriving and self._arriving.done() and not self._arriving.cancelled():
            self._arriving.result()

    async def stop(self) -> None:
        """Sends no more, and gives up what runs."""
        tasks = [task for task in (self._arriving, self._ticking, *self._running) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _arrive(self) -> None:
        for number, ask in enumerate(self._asks):
            # What is not prepared yet is so before it is waited for, not after.
            prepared = self._prepared.popleft() if self._prepared else None
            if prepared is None:
                prepared = self._opened.prepare(ask, number)
            await asyncio.sleep(max(0.0, ask.at_s - self.clock()))
            task = asyncio.create_task(self._one(ask, prepared))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _one(self, ask: Ask, prepared: Any) -> None:
        self.held += self._connections.locked()
        async with self._connections:
            reading = _Counting(ask, self.clock(), self)
            self.sent += 1
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._opened.ask(prepared, reading, self.clock)
            except Failure as failure:
                self._failed(reading, failure.kind, failure.told)
            except TimeoutError:
                self._failed(reading, "timeout", f"no whole answer within {self._timeout_s:g} s")
            except Exception as error:  # whatever it is, the client has no answer
                self._failed(reading, type(error).__name__, str(error))
        self.outcomes.append(reading.outcome)

    def _failed(self, reading: Reading, kind: str, told: str) -> None:
        reading.failed(kind)
        self.told.setdefault(kind, told)

    async def _tick(self) -> None:
        """How late the loop wakes who sleeps: so late are, at most, the times that are noted."""
        with contextlib.suppress(asyncio.CancelledError):
            while not self.is_done:
                due_s = time.monotonic() + _TICK_S
                await asyncio.sleep(_TICK_S)
                self.loop_late_ms.append(max(0.0, time.monotonic() - due_s) * 1000)


class _Counting(Reading):
    def __init__(self, ask: Ask, sent_s: float, pacing: Pacing) -> None:
        super().__init__(ask, sent_s)
        self._pacing = pacing

    def came(self, now_s: float, tokens: int) -> None:
        super().came(now_s, tokens)
        self._pacing.tokens += tokens
