"""Which cores of a host their owners want now, so that workers may lend them to each other.

All workers of one run map the same small file. EngineHost owns a CoreBoard: it claims its cores
when a step begins and releases them when its service has none to follow; and its team has helpers,
guests, on the cores of its neighbour.
"""

import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvrelay.engine.kernels.threads import Guest, read_flag, sleep_us, write_flag
from kvrelay.engine.shapes import LINE_BYTES

log = logging.getLogger(__name__)

_CORES_MAX = 1024
_STEP_MS_MAX = 10_000.0  # a neighbour that has been in a step for longer is dead, or stands still
_GUEST_MS_MAX = 1.0  # a piece takes some 50 µs; a guest that has it for longer stands still
_GUEST_LOOK_US = 10


def clock_ms() -> float:
    """Not kvrelay/clock.py's: steps begin on the engine's thread, which has no event loop."""
    return time.monotonic() * 1000


class CoreBoard:
    """own: the cores of this worker; borrowed: those of its neighbour.

    Of each core the file has the time at which its owner's newest step began, in ms of a clock that
    all processes share, 0 while it is lent; and how many guests have another worker's work in hand.

    Raises OSError when the file cannot be had.
    """

    def __init__(
        self,
        path: Path,
        own: Sequence[int],
        borrowed: Sequence[int],
        clock: Callable[[], float] = clock_ms,
    ) -> None:
        if max(*own, *borrowed) >= _CORES_MAX:
            raise OSError(f"cores beyond {_CORES_MAX}")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Not ftruncate: a full disk would show as a signal, at some later write.
            os.posix_fallocate(file, 0, _CORES_MAX * LINE_BYTES)
            shared = mmap.mmap(file, _CORES_MAX * LINE_BYTES)
        finally:
            os.close(file)
        self._lines = np.frombuffer(shared, np.int64).reshape(_CORES_MAX, -1)
        self._clock = clock
        self._own = [self._step_at(core) for core in own]
        self._borrowed = list(borrowed)
        self._guests = [self._guest_at(core) for core in own]
        self._stuck: set[int] = set()  # guests that stood still when last looked at
        self.release()
        for core in borrowed:  # a worker that was here before may have left its guests'
            write_flag(self._guest_at(core), 0)

    def claim(self) -> None:
        """A step begins. Waits until the guests on these cores have nothing in hand, a millisecond
        at most: one put aside in the middle of a piece holds up its whole team."""
        self._mark(max(1, int(self._clock())))
        self._wait_for_guests()

    def release(self) -> None:
        """No step is to follow for a while. Not for each moment between two: guests that come for
        no more than that are only in the way."""
        self._mark(0)

    @property
    def neighbour_computes(self) -> bool:
        """A worker with guests on these cores has steps, and has not been in one for too long."""
        since_ms = max(read_flag(self._step_at(core)) for core in self._borrowed)
        return bool(since_ms) and self._clock() - since_ms < _STEP_MS_MAX

    def guests(self) -> list[Guest]:
        """For a Team, which must not outlive this board."""
        return [Guest(core, self._step_at(core), self._guest_at(core)) for core in self._borrowed]

    def _mark(self, value: int) -> None:
        for address in self._own:
            write_flag(address, value)

    def _wait_for_guests(self) -> None:
        until_ms = self._clock() + _GUEST_MS_MAX
        for guest in self._guests:
            # Below 0: one of a worker that was replaced has left after its count was reset.
            while read_flag(guest) > 0 and guest not in self._stuck:
                if self._clock() > until_ms:
                    self._stuck.add(guest)
                sleep_us(_GUEST_LOOK_US)
            if read_flag(guest) <= 0:
                self._stuck.discard(guest)

    def _step_at(self, core: int) -> int:
        return int(self._lines[core:].ctypes.data)

    def _guest_at(self, core: int) -> int:
        return self._step_at(core) + self._lines.itemsize


def open_board(path: Path, own: Sequence[int], borrowed: Sequence[int]) -> CoreBoard | None:
    """None where nothing is borrowed, or can be: it is slower, but serves."""
    if not borrowed:
        return None
    try:
        return CoreBoard(path, own, borrowed)
    except OSError as error:
        log.warning("no cores are lent or borrowed: %s", error)
        return None
