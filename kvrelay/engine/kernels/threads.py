"""How the threads of a step share its work: counters to take pieces from, barriers between phases.

A step is compiled code that all threads run at once, the engine's own and its helpers. Team owns
the helpers: they sleep between steps.
"""

import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from kvrelay.engine.kernels.vector import Code, Int, emitted
from kvrelay.engine.shapes import LINE_BYTES

_SPINS = 2000  # about 50 µs; then somebody else may need the core
_INT64 = ir.IntType(64)


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
def take(counter):  # type: ignore[no-untyped-def]
    """The next piece of the work that `counter` (an address) counts."""
    return _add(counter, 1)


@njit(nogil=True, cache=True)
def read_flag(address):  # type: ignore[no-untyped-def]
    return _read(address)


@njit(nogil=True, cache=True)
def write_flag(address, value):  # type: ignore[no-untyped-def]
    _write(address, value)


@njit(nogil=True, cache=True)
def wait_for_all(barrier, threads):  # type: ignore[no-untyped-def]
    """Returns when all threads are here. barrier: address of two cache lines, zero at first."""
    if threads == 1:
        return
    rounds = barrier + LINE_BYTES
    this = _read(rounds)
    if _add(barrier, 1) == threads - 1:
        _write(barrier, 0)
        _add(rounds, 1)
        return
    spins = 0
    while _read(rounds) == this:
        _pause()
        spins += 1
        if spins > _SPINS:
            _yield_core()


class Team:
    """`threads - 1` helpers beside the calling thread. One step at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._step: Callable[[int], Any] | None = None
        self._begin = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._ended = threading.Semaphore(0)
        self._failed: BaseException | None = None
        self._helpers = [
            threading.Thread(target=self._help, args=(number,), daemon=True)
            for number in range(1, threads)
        ]
        for helper in self._helpers:
            helper.start()

    def run(self, step: Callable[[int], Any]) -> None:
        """Calls step(0) here and step(1) ... in the helpers, and waits for all.

        step must let go of the interpreter's lock, as compiled code does. What it raises in any
        thread is raised here, once all have ended.
        """
        self._step = step
        for begin in self._begin:
            begin.release()
        try:
            step(0)
        finally:  # nobody may be left in a step whose buffers the next one uses
            for _ in self._begin:
                self._ended.acquire()
            failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def close(self) -> None:
        self._step = None
        for begin in self._begin:
            begin.release()
        for helper in self._helpers:
            helper.join()

    def _help(self, number: int) -> None:
        while True:
            self._begin[number - 1].acquire()
            if self._step is None:
                return
            try:
                self._step(number)
            except BaseException as error:
                self._failed = error
            finally:
                self._ended.release()


def aligned(count: int, dtype: Any) -> np.ndarray:
    """`[count]` zeros that begin at a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + size].view(dtype)
