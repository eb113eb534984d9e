"""Carries out faults on the cluster's processes, and notes when it was whole again.

Made by run.py, which calls `step` several times a second.
"""

import contextlib
from collections.abc import Callable

import psutil

from cluster.chaos.faults import Course, Fault, State, Strike
from cluster.chaos.processes import Member, Processes, is_alive

_LOOK_S = 0.5  # between two looks whether the cluster is whole
_STREAMS_MIN = 4  # a fault that meets nobody shows nothing: it waits for so many,
_STREAMS_WAIT_S = 5.0  # but no longer


class Siege:
    def __init__(self, processes: Processes, course: Course) -> None:
        self._processes = processes
        self._course = course
        self._stopped: psutil.Process | None = None
        self._look_s = 0.0

    @property
    def strikes(self) -> list[Strike]:
        return self._course.strikes

    @property
    def is_over(self) -> bool:
        """No fault lasts."""
        return self._course.state is State.QUIET

    def step(self, now_s: float, streams: Callable[[], int] | None) -> None:
        """Does what is due. `streams` tells how many run; with None nothing new begins."""
        course = self._course
        if streams is not None and (fault := course.due(now_s)) is not None:
            overdue = course.due(now_s - _STREAMS_WAIT_S) is not None
            if overdue or streams() >= _STREAMS_MIN:
                self._strike(fault, now_s)
        elif self._stopped and not is_alive(self._stopped):
            self._stopped = None
            course.ended(now_s)
        elif course.wake_due(now_s):
            self.close()
            course.woken(now_s)
        elif course.state is State.BROKEN and now_s >= self._look_s:
            course.looked(self._processes.are_whole(), now_s)
            self._look_s = now_s + _LOOK_S

    def close(self) -> None:
        """Nobody stays stopped."""
        if self._stopped is not None:
            with contextlib.suppress(psutil.NoSuchProcess):  # somebody has ended it meanwhile
                self._stopped.resume()
            self._stopped = None

    def _strike(self, fault: Fault, now_s: float) -> None:
        members = self._processes.members(fault.role)
        if not members:
            self._course.missed(now_s)
            return
        process = _picked(members, fault).process
        try:
            if fault.kills:
                process.kill()
            else:
                process.suspend()
                self._stopped = process
        except psutil.NoSuchProcess:
            self._course.missed(now_s)
        else:
            self._course.struck(process.pid, now_s)


def _picked(members: list[Member], fault: Fault) -> Member:
    return members[int(fault.pick * len(members))]
