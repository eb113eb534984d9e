"""Named places in a worker where a test makes the real process die, hang or fail.

Armed through `WorkerConfig.failpoints` alone, by a program that makes a worker: no message, no
client and no option of the command line reaches it. Whoever owns such places makes one Failpoints
of its own from the config and calls `hit` there. With nothing armed, that is one look at an empty
tuple.
"""

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)


class Point(StrEnum):
    """In the order in which a request comes by. Every place may be hit many times."""

    # Both roles, on the engine's thread
    ENGINE_STEP = "engine.step"  # the KV is written, nobody has been told

    # Prefill worker
    PREFILL_BEFORE_BEGIN = "prefill.before_begin"  # it has the ticket, not yet leave to write
    PREFILL_BEFORE_CHUNK = "prefill.before_chunk"
    PREFILL_AFTER_CHUNK = "prefill.after_chunk"  # computed, nobody has been told
    PREFILL_PUSHED = "prefill.pushed"  # blocks are on their way; more may follow
    PREFILL_BEFORE_COMMIT = "prefill.before_commit"  # all blocks have been sent
    PREFILL_COMMIT_SENT = "prefill.commit_sent"  # and not acknowledged

    # Decode worker
    DECODE_RESERVED = "decode.reserved"  # the router has not been told
    DECODE_BEGIN = "decode.begin"  # a writer asks for leave to write, and has it not
    DECODE_RECEIVED = "decode.received"  # some blocks are in; more may follow
    DECODE_COMMITTED = "decode.committed"  # before the first step; the writer has not been told
    DECODE_BEFORE_STEP = "decode.before_step"
    DECODE_AFTER_STEP = "decode.after_step"  # computed, nobody has been told
    DECODE_FINISH = "decode.finish"  # the last token is there, the blocks are not free yet


class Action(StrEnum):
    KILL = "kill"  # SIGKILL
    HANG = "hang"  # SIGSTOP, or the thread sleeps for hang_ms
    FAIL = "fail"  # raises FailpointError


class Failpoint(BaseModel):
    """What happens at one hit of one place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    point: Point
    action: Action
    hit: int = Field(default=1, ge=1)  # which one, counted from the start of the worker
    hang_ms: int = Field(default=0, ge=0)  # 0: until somebody sends SIGCONT


class FailpointError(Exception):
    """What an armed place raises."""


class Failpoints:
    """What is armed in one worker, and how often each place was hit."""

    def __init__(self, armed: Sequence[Failpoint] = ()) -> None:
        self._armed = tuple(armed)
        self._hits: Counter[Point] = Counter()  # each place is hit from one thread alone

    def hit(self, point: Point) -> None:
        """Raises FailpointError, or does not return, where that is armed."""
        if self._armed:
            self._count(point)

    def _count(self, point: Point) -> None:
        self._hits[point] += 1
        for armed in self._armed:
            if armed.point is point and armed.hit == self._hits[point]:
                _trip(armed)


def _trip(armed: Failpoint) -> None:
    log.warning("failpoint %s, hit %d: %s", armed.point, armed.hit, armed.action)
    if armed.action is Action.KILL:
        _die()
    if armed.action is Action.FAIL:
        raise FailpointError(f"failpoint {armed.point}, hit {armed.hit}")
    if armed.hang_ms:
        time.sleep(armed.hang_ms / 1000)
    else:
        # At this thread, which then stops here: of a signal to the process as a whole another may
        # be the first to know.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL does not return")
