"""How the threads of a step share its work: counters to take pieces from, phases one after another.

A step is compiled code that all threads run at once: the engine's own, number 0, and its helpers.
Thread 0 opens a phase when the one before has no piece left and nobody is in the middle of one. It
waits for no helper that is not there: the system may put one aside at any moment. A helper that
comes late runs through the phases that are over, whose counters are used up. Team owns the helpers:
they sleep between steps.
"""

import logging
import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from kvrelay.engine.kernels.vector import Code, Int, emitted
from kvrelay.engine.shapes import LINE_BYTES

log = logging.getLogger(__name__)

_SPINS = 2000  # about 50 µs; then somebody else may need the core
_LOOK_US = 1000  # between two looks at whether the owner of a core still computes
# Rows of a step that guests are woken for. For fewer, as decode steps have, it would be in vain:
# one core reads weights nearly as fast as two.
GUEST_ROWS_MIN = 32
_GUEST_NICENESS = 4  # more than its team's: the owner has more to do than compute
_INT64 = ir.IntType(64)

# What the threads of a team agree by, a cache line each.
_OPEN = 0  # the address of the newest phase's counter; later phases have higher ones
_IN_PHASE = LINE_BYTES  # helpers that may have a piece in hand
_STEP = 2 * LINE_BYTES  # the number of the step that runs; 0: none does
_IN_STEP = 3 * LINE_BYTES  # helpers whose arguments are still used
_LINES = 4
_ALL_OPEN = (1 << 63) - 1
_NO_PIECE = 1 << 40  # past the last one of any phase

# What a thread knows of itself: the address of these lines; and where its core is somebody else's,
# of what says that the owner computes, and of what tells the owner that this thread does. Else 0.
SEAT = np.dtype([("team", np.int64), ("owner", np.int64), ("guest", np.int64)])


@emitted
def _add(c: Code, address: Int, amount: Int) -> Int:
    """Atomically; gives what was there before."""
    place = c.builder.inttoptr(address.value, _INT64.as_pointer())
    return Int(c, c.builder.atomic_rmw("add", place, amount.value, "seq_cst"))


@emitted
def _read(c: Code, address: Int) -> Int:
    place = c.builder.inttoptr(address.value, _INT64.as_pointer())
    return Int(c, c.builder.load_atomic(place, "seq_cst", 8))


@emitted
def _write(c: Code, address: Int, value: Int) -> None:
    place = c.builder.inttoptr(address.value, _INT64.as_pointer())
    c.builder.store_atomic(value.value, place, "seq_cst", 8)


@emitted
def _yield_core(c: Code) -> Int:
    """libc's sched_yield."""
    result = c.call("sched_yield", ir.IntType(32))
    return Int(c, c.builder.sext(result, _INT64))


@emitted
def _sleep_us(c: Code, us: Int) -> Int:
    """libc's usleep."""
    result = c.call("usleep", ir.IntType(32), c.builder.trunc(us.value, ir.IntType(32)))
    return Int(c, c.builder.sext(result, _INT64))


@emitted
def _pause(c: Code) -> None:
    """Leaves the core to its other hyperthread, or its clock to the others, for a moment."""
    if platform.machine() in ("x86_64", "AMD64"):
        c.call("llvm.x86.sse2.pause", ir.VoidType())


@emitted
def _cycles(c: Code) -> Int:
    """The processor's time stamp."""
    return Int(c, c.call("llvm.readcyclecounter", _INT64))


@njit(nogil=True, cache=True)
def note_time(address):  # type: ignore[no-untyped-def]
    _write(address, _cycles())


@njit(nogil=True, cache=True)
def take(counter, seat):  # type: ignore[no-untyped-def]
    """The next piece of the work that `counter` (an address) counts; past the last one when the
    core is wanted by its owner."""
    if seat.owner and _read(seat.owner):
        return _NO_PIECE
    return _add(counter, 1)


@njit(nogil=True, cache=True)
def read_flag(address):  # type: ignore[no-untyped-def]
    return _read(address)


@njit(nogil=True, cache=True)
def write_flag(address, value):  # type: ignore[no-untyped-def]
    _write(address, value)


@njit(nogil=True, cache=True)
def sleep_us(us):  # type: ignore[no-untyped-def]
    _sleep_us(us)


@njit(nogil=True, cache=True)
def _rest(spins):  # type: ignore[no-untyped-def]
    _pause()
    if spins > _SPINS:
        _yield_core()


@njit(nogil=True, cache=True)
def _enter(seat):  # type: ignore[no-untyped-def]
    _add(seat.team + _IN_PHASE, 1)
    if seat.guest:
        _add(seat.guest, 1)


@njit(nogil=True, cache=True)
def _leave(seat):  # type: ignore[no-untyped-def]
    _add(seat.team + _IN_PHASE, -1)
    if seat.guest:
        _add(seat.guest, -1)


@njit(nogil=True, cache=True)
def begin_step(thread, seat, step):  # type: ignore[no-untyped-def]
    """Whether this thread may take part in the step of this number: false once that is over. A
    guest waits here until the owner of its core computes nothing."""
    if thread == 0:
        return True
    while seat.owner and _read(seat.owner):
        if _read(seat.team + _STEP) != step:
            return False
        _sleep_us(_LOOK_US)
    _add(seat.team + _IN_STEP, 1)
    if _read(seat.team + _STEP) != step:
        _add(seat.team + _IN_STEP, -1)
        return False
    _enter(seat)
    return True


@njit(nogil=True, cache=True)
def end_step(thread, seat):  # type: ignore[no-untyped-def]
    """After it a helper uses nothing of the step."""
    if thread:
        _leave(seat)
        _add(seat.team + _IN_STEP, -1)


@njit(nogil=True, cache=True)
def next_phase(thread, seat, counter):  # type: ignore[no-untyped-def]
    """Ends this thread's part of a phase; returns when the phase with this counter, whose address
    is above those of the phases before, may be worked at."""
    spins = 0
    if thread == 0:
        while _read(seat.team + _IN_PHASE):
            spins += 1
            _rest(spins)
        _write(seat.team + _OPEN, counter)
        return
    _leave(seat)
    while True:
        newest = _read(seat.team + _OPEN)
        if seat.owner and newest != _ALL_OPEN and _read(seat.owner):
            _sleep_us(_LOOK_US)
            continue
        if newest >= counter:
            break
        spins += 1
        _rest(spins)
    _enter(seat)  # a phase that has ended meanwhile leaves a counter that is used up


@njit(nogil=True, cache=True)
def _open_step(team, step):  # type: ignore[no-untyped-def]
    _write(team + _OPEN, 0)
    _write(team + _STEP, step)


@njit(nogil=True, cache=True)
def _close_step(team):  # type: ignore[no-untyped-def]
    """Returns when no helper uses anything of the step any more."""
    _write(team + _STEP, 0)
    _write(team + _OPEN, _ALL_OPEN)
    spins = 0
    while _read(team + _IN_STEP):
        spins += 1
        _rest(spins)


@dataclass(frozen=True)
class Guest:
    """A helper on a core of somebody else. owner_at: address of an int64 that is not 0 while the
    owner computes; guest_at: of one that is not 0 while the helper does."""

    core: int
    owner_at: int
    guest_at: int


class Team:
    """`threads - 1` helpers beside the calling thread, and `guests`. One step at a time."""

    def __init__(self, threads: int, guests: Sequence[Guest] = ()) -> None:
        self.threads = threads
        self.size = threads + len(guests)
        self._lines = aligned(_LINES * LINE_BYTES, np.uint8)
        self._at = self._lines.ctypes.data
        places = [(0, 0)] * threads + [(guest.owner_at, guest.guest_at) for guest in guests]
        self.seats = np.array([(self._at, *place) for place in places], SEAT)
        self._steps = 0
        self._step: tuple[Callable[[int, int], Any], int] | None = None
        self._begin = [threading.Semaphore(0) for _ in range(self.size - 1)]
        self._failed: BaseException | None = None
        self._closed = False
        self._helpers = [
            threading.Thread(target=self._help, args=(number, core), daemon=True)
            for number, core in enumerate([None] * (threads - 1) + [g.core for g in guests], 1)
        ]
        for helper in self._helpers:
            helper.start()

    def run(self, step: Callable[[int, int], Any], *, with_guests: bool = False) -> None:
        """Calls step(0, number) here and step(1, number) ... in the helpers, as far as they come in
        time; returns when all that have are out of it.

        step must be compiled code that lets go of the interpreter's lock, and asks begin_step with
        its thread's seat and `number` before all else. What it raises in a helper is raised by this
        call, or the next where it came late.
        """
        self._steps += 1
        _open_step(self._at, self._steps)
        self._step = (step, self._steps)
        for begin in self._begin if with_guests else self._begin[: self.threads - 1]:
            begin.release()
        try:
            step(0, self._steps)
        finally:  # nobody may be left in a step whose buffers the next one uses
            _close_step(self._at)
            self._step = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def close(self) -> None:
        self._closed = True
        for begin in self._begin:
            begin.release()
        for helper in self._helpers:
            helper.join()

    def _help(self, number: int, core: int | None) -> None:
        if core is not None and not _move_to(core):
            return
        while True:
            self._begin[number - 1].acquire()
            if self._closed:
                return
            if asked := self._step:
                step, of_step = asked
                try:
                    step(number, of_step)
                except BaseException as error:
                    self._failed = error
                del asked, step  # and the buffers behind them


def _move_to(core: int) -> bool:
    """This thread. False when the system refuses: it would take cores from somebody else."""
    thread = threading.get_native_id()
    try:
        os.sched_setaffinity(thread, [core])
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _GUEST_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
    except OSError as error:
        log.warning("core %d of another worker is not used: %s", core, error)
        return False
    return True


def aligned(count: int, dtype: Any) -> np.ndarray:
    """`[count]` zeros that begin at a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + size].view(dtype)
