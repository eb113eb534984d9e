"""One NCCL communicator between this worker and one peer, on a thread that can be given up on.

nccl_pairs.py owns the pairs. Every NCCL call of a pair is made on the pair's own thread; the event
loop keeps the state, waits for futures, and ends each wait at its deadline. A thread that NCCL
never returns to is left behind: the pair is HUNG, and neither the loop nor another pair notices.
"""

import asyncio
import contextlib
import enum
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.lifecycle import advance
from kvrelay.transport.channel import to_end
from kvrelay.transport.nccl_errors import NcclError
from kvrelay.transport.nccl_library import Communicator, Direction, NcclLibrary, Region

log = logging.getLogger(__name__)

# Between two questions to NCCL: short at first, for a block takes less than a millisecond.
_PAUSE_MIN_S, _PAUSE_MAX_S = 20e-6, 1e-3
_PAUSE_ABORT_S = 10e-3


class PairState(enum.Enum):
    OPENING = enum.auto()
    READY = enum.auto()
    CLOSING = enum.auto()  # finishes what it has, then goes in good order
    ABORTING = enum.auto()
    CLOSED = enum.auto()
    HUNG = enum.auto()  # its abort did not return in time, or the device is still at work


class PairEvent(enum.Enum):
    OPENED = enum.auto()
    CLOSE = enum.auto()
    FAILED = enum.auto()
    OVERDUE = enum.auto()  # the end of the abort
    ENDED = enum.auto()  # the thread: NCCL and the device are done with this pair


_S, _E = PairState, PairEvent
TRANSITIONS = {
    (_S.OPENING, _E.OPENED): _S.READY,
    (_S.OPENING, _E.FAILED): _S.ABORTING,
    (_S.READY, _E.CLOSE): _S.CLOSING,
    (_S.READY, _E.FAILED): _S.ABORTING,
    (_S.CLOSING, _E.FAILED): _S.ABORTING,
    (_S.CLOSING, _E.ENDED): _S.CLOSED,
    (_S.ABORTING, _E.OVERDUE): _S.HUNG,
    (_S.ABORTING, _E.ENDED): _S.CLOSED,
    (_S.HUNG, _E.ENDED): _S.CLOSED,  # late, but its memory is safe from here on
}


@dataclass(frozen=True, eq=False)
class _Job:
    direction: Direction
    regions: tuple[Region, ...]
    done: asyncio.Future[None]


class NcclPair:
    """Made on an event loop, and used from that loop only. Rank 0 is P, rank 1 is D.

    Operations are carried out one after the other, in the order of the calls; both ends must call
    in the same order with the same sizes. What the device wrote before must be finished (the
    engine's step has ended) before a region is sent.
    `lost` is called once, with the reason, when the pair fails; not when it is closed.
    """

    def __init__(
        self,
        library: NcclLibrary,
        unique_id: bytes,
        rank: int,
        device: int,
        *,
        abort_s: float,
        lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.state = PairState.OPENING
        self.reason = ""  # why it failed
        self._abort_s = abort_s
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._left = asyncio.Event()  # CLOSED or HUNG
        self._closed = asyncio.Event()
        self._under_way: set[_Job] = set()  # as far as is known here, still in NCCL's hands
        self._overdue: asyncio.TimerHandle | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no more
        self._stop = threading.Event()
        thread = threading.Thread(
            target=self._run,
            args=(library, unique_id, rank, device),
            name=f"nccl-pair-rank{rank}",
            daemon=True,  # it may never end
        )
        try:
            thread.start()
        except RuntimeError as error:
            raise NcclError(f"no thread for an NCCL pair: {error}") from error

    @property
    def memory_safe(self) -> bool:
        """Whether neither NCCL nor the device can still read or write a region given to it. While
        it is false the blocks must stay in quarantine, failed operations or not."""
        return not self._under_way

    async def opened(self, deadline_s: float) -> None:
        """Returns when both ends have come; NcclError when that fails or takes too long."""
        await to_end(self._within(self._opened, deadline_s, "the pair did not open"))

    async def send(self, regions: Sequence[Region], deadline_s: float) -> None:
        """Returns when the device has sent all regions. Any error has ended the pair.

        A cancel takes effect when the operation has ended, by its deadline at the latest: half an
        operation would leave the two ends at odds.
        """
        await self._operate(Direction.SEND, regions, deadline_s)

    async def receive(self, regions: Sequence[Region], deadline_s: float) -> None:
        """Returns when the device has written all regions; otherwise like `send`."""
        await self._operate(Direction.RECEIVE, regions, deadline_s)

    def fail(self, reason: str) -> None:
        """Ends the pair: every operation gets the reason, and the communicator is aborted."""
        if self.state not in (PairState.OPENING, PairState.READY, PairState.CLOSING):
            return
        self._move(PairEvent.FAILED)
        self.reason = reason
        self._overdue = self._loop.call_later(self._abort_s, self._abort_overdue)
        self._stop.set()
        self._jobs.put(None)
        for future in (self._opened, *(job.done for job in self._under_way)):
            if not future.done():
                future.set_exception(NcclError(reason))
                future.exception()  # seen: nobody need be waiting for it
        self._lost(reason)

    async def close(self, deadline_s: float) -> None:
        """Finishes what is under way, then closes; aborts when that takes too long. Returns when
        the pair is CLOSED or HUNG, so within `deadline_s` and the abort's own deadline."""
        await to_end(self._close(deadline_s))

    async def wait_closed(self) -> None:
        """Returns when the pair is CLOSED: never, it may be, when it is HUNG."""
        await self._closed.wait()

    def __repr__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"<NcclPair {self.state.name}, {len(self._under_way)} under way{reason}>"

    # ---- on the event loop

    async def _operate(
        self, direction: Direction, regions: Sequence[Region], deadline_s: float
    ) -> None:
        if self.state is not PairState.READY:
            raise NcclError(f"the pair is {self.state.name}: {self.reason or 'not open'}")
        job = _Job(direction, tuple(regions), self._loop.create_future())
        self._under_way.add(job)
        self._jobs.put(job)
        what = f"{direction.name} of {len(job.regions)} regions was not done"
        await to_end(self._within(job.done, deadline_s, what))

    async def _within(self, future: asyncio.Future[None], deadline_s: float, what: str) -> None:
        done, _ = await asyncio.wait({future}, timeout=deadline_s)
        if not done:
            self.fail(f"{what} within {deadline_s:g} s")
        future.result()

    async def _close(self, deadline_s: float) -> None:
        if self.state is PairState.OPENING:
            self.fail("closed before it was open")
        elif self.state is PairState.READY:
            self._move(PairEvent.CLOSE)
            self._jobs.put(None)
        try:
            async with asyncio.timeout(deadline_s):
                await self._left.wait()
        except TimeoutError:
            self.fail(f"did not close within {deadline_s:g} s")
            await self._left.wait()

    def _move(self, event: PairEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)
        if self.state in (PairState.CLOSED, PairState.HUNG):
            self._left.set()

    def _abort_overdue(self) -> None:
        self._move(PairEvent.OVERDUE)
        log.error(
            "NCCL did not end a pair within %g s of its abort; its thread is left behind. It had "
            "failed because: %s",
            self._abort_s,
            self.reason,
        )

    # ---- what the thread tells, on the event loop

    def _has_opened(self) -> None:
        if self.state is PairState.OPENING:
            self._move(PairEvent.OPENED)
            self._opened.set_result(None)

    def _has_done(self, job: _Job) -> None:
        self._under_way.discard(job)
        if not job.done.done():
            job.done.set_result(None)

    def _has_ended(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
        self._under_way.clear()
        self._move(PairEvent.ENDED)
        self._closed.set()

    # ---- on the pair's thread

    def _run(self, library: NcclLibrary, unique_id: bytes, rank: int, device: int) -> None:
        communicator: Communicator | None = None
        try:
            communicator = library.communicator(unique_id, rank, device)
            self._serve(communicator)
        except Exception as error:
            if not isinstance(error, NcclError):
                log.exception("the thread of an NCCL pair failed")
            self._tell(self.fail, str(error))
            if communicator is not None and not self._abort(communicator):
                return  # its memory is not safe: the pair will be HUNG, and stay so
        self._tell(self._has_ended)

    def _serve(self, communicator: Communicator) -> None:
        self._until(communicator.ready)
        self._tell(self._has_opened)
        while (job := self._jobs.get()) is not None:
            communicator.post(job.direction, job.regions)
            # The device may not have been given the work before NCCL is ready again.
            self._until(lambda: communicator.ready() and communicator.idle())
            self._tell(self._has_done, job)
        if self._stop.is_set():
            raise NcclError(self.reason)
        communicator.finalize()
        self._until(communicator.ready)
        communicator.destroy()

    def _abort(self, communicator: Communicator) -> bool:
        """Whether the device has let go of all memory. It is not enough that NCCL says so: a
        kernel that hangs is on the stream still."""
        try:
            communicator.abort()
            while not communicator.idle():
                if self._loop.is_closed():
                    return False
                time.sleep(_PAUSE_ABORT_S)
        except NcclError as error:
            log.error("NCCL could not abort a pair: %s", error)
            return False
        return True

    def _until(self, condition: Callable[[], bool]) -> None:
        pause_s = _PAUSE_MIN_S
        while not condition():
            if self._stop.wait(pause_s) or self._loop.is_closed():
                raise NcclError(self.reason or "the worker has ended")
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *args)
