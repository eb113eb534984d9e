"""Holds and spoils blocks on their way out of a process of link_ends.py, where no proxy can."""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from link_settings import Say
from nccl_double import DoubleCommunicator, DoubleNccl

from kvrelay.transport import shm
from kvrelay.transport.nccl_library import Direction, Region

_HELD_MAX_S = 30.0  # of a thread that the test forgot


class Gate:
    """Holds a thread that moves blocks, once, in the middle."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._left = -1
        self._opened = threading.Event()

    def arm(self, after: int) -> None:
        self._left = after
        self._opened.clear()

    def open(self) -> None:
        self._left = -1
        self._opened.set()

    def holds(self) -> bool:
        self._left -= 1
        return self._left == -1

    def wait(self) -> None:
        self._say(event="held")
        self._opened.wait(_HELD_MAX_S)


class FaultyNccl(DoubleNccl):
    """The double, spoiling the next `flips` groups of blocks it sends, and with a gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.flips = 0
        self.gate = gate

    def communicator(self, unique_id: bytes, rank: int, device: int) -> DoubleCommunicator:
        self.enter("communicator")
        address = b"\0" + unique_id.rstrip(b"\0")
        communicator = _FaultyCommunicator(self, address, rank)
        self.communicators[:] = [communicator]  # older ones may go
        return communicator


class _FaultyCommunicator(DoubleCommunicator):
    def post(self, direction: Direction, regions: Sequence[Region]) -> None:
        library: Any = self._library
        if direction is Direction.SEND and library.flips > 0:
            library.flips -= 1
            regions = [self._spoiled(regions[0]), *regions[1:]]
        super().post(direction, regions)
        if direction is Direction.SEND and library.gate.holds():
            library.gate.wait()

    def _spoiled(self, region: Region) -> Region:
        self._copy = ctypes.create_string_buffer(
            ctypes.string_at(region.address, region.size_bytes), region.size_bytes
        )
        self._copy[3] = self._copy.raw[3] ^ 1
        return Region(ctypes.addressof(self._copy), region.size_bytes)


def hold_copies(gate: Gate) -> None:
    """Lets the gate hold the copy of a block into shared memory when half of it is written."""
    copy = shm.stream_copy

    def held(source: np.ndarray, target: np.ndarray) -> None:
        if gate.holds():
            half = len(source) // 2
            copy(source[:half], target[:half])
            gate.wait()
        copy(source, target)

    shm.stream_copy = held
