"""Which cores of a host compute now, so that workers may lend them to each other.

All workers of one run map the same small file. EngineHost owns a CoreBoard: it says when its steps
begin and end, and its team has helpers on the cores of the neighbour.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvrelay.engine.kernels.threads import Guest, wait_for_guest
from kvrelay.engine.shapes import LINE_BYTES

_CORES_MAX = 4096


class CoreBoard:
    """own: the cores of this worker; borrowed: those of its neighbour.

    A worker that dies in a step leaves its cores marked until it is replaced: nobody borrows them.
    """

    def __init__(self, path: Path, own: Sequence[int], borrowed: Sequence[int]) -> None:
        self._borrowed = borrowed
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, _CORES_MAX * LINE_BYTES)
            shared = mmap.mmap(file, _CORES_MAX * LINE_BYTES)
        finally:
            os.close(file)
        lines = np.frombuffer(shared, np.int64).reshape(_CORES_MAX, -1)
        self._marks, self._guests = lines[:, 0], lines[:, 1]
        self._own = list(own)
        self._marks[self._own] = 0
        self._guests[list(borrowed)] = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a step."""
        self._marks[self._own] = 1
        for core in self._own:
            wait_for_guest(self._guests[core:].ctypes.data)
        try:
            yield
        finally:
            self._marks[self._own] = 0

    @property
    def neighbour_computes(self) -> bool:
        return bool(self._marks[list(self._borrowed)].any())

    def guests(self) -> list[Guest]:
        """For a Team, which must not outlive this board."""
        return [
            Guest(core, self._marks[core:].ctypes.data, self._guests[core:].ctypes.data)
            for core in self._borrowed
        ]
