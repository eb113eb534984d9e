"""Virtual time: one timeline, and an event loop for every simulated process on it.

Nothing here sleeps, and there is one thread. The timeline holds all that is to happen, of all
processes, in one order: by time, then by a draw of the seed's if it is told to shuffle, then by
insertion. Time jumps from one entry to the next. A process has a loop of its own, so it can be
stopped like with SIGSTOP (what comes waits, and time goes on) and killed between two callbacks.
"""

import asyncio
import contextlib
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from enum import Enum
from random import Random
from typing import Any

START_S = 1000.0
_PASS_MAX = 100_000  # callbacks of one process at one time: more never end
_UNWINDS_MAX = 20  # rounds of cancels at the end of a process


class LivelockError(Exception):
    """A process goes round without time going on."""


class Timeline:
    """shuffle: decides the order of what happens at the same time; None: that of insertion."""

    def __init__(self, shuffle: Random | None = None) -> None:
        self.now_s = START_S
        self.entries = 0  # that have happened
        self._shuffle = shuffle
        self._number = 0
        self._heap: list[tuple[float, float, int, ProcessLoop | None, Any]] = []

    def put(self, when_s: float, loop: "ProcessLoop | None", handle: Any) -> None:
        """handle: an asyncio.Handle for a process, a function for none; None only wakes."""
        self._number += 1
        tie = 0.0 if self._shuffle is None else self._shuffle.random()
        if when_s < self.now_s:
            when_s = self.now_s
        heapq.heappush(self._heap, (when_s, tie, self._number, loop, handle))

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """For whoever simulates: outside of every process."""
        self.put(when_s, None, call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.put(self.now_s + delay_s, None, call)

    def step(self) -> bool:
        """The next entry happens; False when there is none."""
        while self._heap:
            when_s, _, _, loop, handle = heapq.heappop(self._heap)
            if loop is None:
                self.now_s = when_s
                self.entries += 1
                handle()
                return True
            if loop.life is Life.DEAD or (handle is not None and handle.cancelled()):
                continue
            self.now_s = when_s
            self.entries += 1
            loop.take(handle)
            return True
        return False


class Life(Enum):
    RUNNING = "running"
    STOPPED = "stopped"  # it does nothing, and what comes waits
    DEAD = "dead"


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop of one process, as far as the roles use one. `offset_s`: its clock differs
    from the timeline's by that; `failed` hears what no task has caught."""

    def __init__(
        self, timeline: Timeline, offset_s: float = 0.0, failed: Callable[[str], None] = print
    ) -> None:
        self.life = Life.RUNNING
        self._woken = False  # a wake-up is on the timeline, or callbacks are being run
        super().__init__()
        self._timeline = timeline
        self._offset_s = offset_s
        self._failed = failed
        self._ready: deque[asyncio.Handle] = deque()
        self._tasks: list[asyncio.Task[Any]] = []
        self._tasks_most = 64

    # ---- what asyncio asks of a loop; the types are plainer than asyncio's own

    def time(self) -> float:
        return self._timeline.now_s + self._offset_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        if not self._woken:
            self._woken = True
            self._timeline.put(self._timeline.now_s, self, None)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timeline.put(when - self._offset_s, self, handle)
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **settings: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(coro, loop=self, **settings)
        if len(self._tasks) >= self._tasks_most:
            self._tasks = [known for known in self._tasks if not known.done()]
            self._tasks_most = max(64, 2 * len(self._tasks))
        self._tasks.append(task)  # asyncio itself would let go of a task that nobody holds
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """There are no threads: done at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.life is not Life.DEAD:
            self._failed(f"{context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._woken

    def is_closed(self) -> bool:
        return self.life is Life.DEAD

    def __del__(self) -> None:
        """Nothing is to be closed."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    # ---- what happens to a process

    def take(self, handle: asyncio.Handle | None) -> None:
        """From the timeline: a timer that is due, or a wake-up."""
        if handle is not None:
            self._ready.append(handle)
        if self.life is Life.RUNNING:
            self._run()

    def post(self, when_s: float, callback: Callable[..., Any], *args: Any) -> None:
        """At that time of the timeline, in this process."""
        self._timeline.put(when_s, self, asyncio.Handle(callback, args, self))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """From outside of every process."""
        with self._current():
            return self.create_task(work)

    def stop_running(self) -> None:
        self.life = Life.STOPPED

    def go_on(self) -> None:
        if self.life is Life.STOPPED:
            self.life = Life.RUNNING
            self._woken = True
            self._timeline.put(self._timeline.now_s, self, None)

    def die(self) -> None:
        """Nothing of it runs any more; call `unwind` when no callback of it is running."""
        self.life = Life.DEAD

    def unwind(self) -> None:
        """Lets go of what its tasks hold. They run to their ends, which nobody sees."""
        self.life = Life.DEAD
        self._woken = True
        for _ in range(_UNWINDS_MAX):
            left = [task for task in self._tasks if not task.done()]
            if not left:
                break
            with self._current():
                for task in left:
                    task.cancel()
                self._drain(Life.DEAD)
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.exception()  # seen
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.clear()
        self._ready.clear()

    def _run(self) -> None:
        self._woken = True
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            self._drain(Life.RUNNING)
        finally:
            events._set_running_loop(before)
        self._woken = False

    def _drain(self, life: Life) -> None:
        ready, left = self._ready, _PASS_MAX
        while ready and self.life is life:
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
            left -= 1
            if not left:
                raise LivelockError(f"{_PASS_MAX} callbacks at one time, the last: {handle!r}")

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(before)
