"""Counts what is computed for, and held by, requests that were let go of: since the decode worker
let go, and since their clients did."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

_LOOK_S = 0.005


class StepCounter:
    """Watches one decode worker: the steps of each sequence that begin after its client's cancel,
    and those that end after it was aborted there. And, while `watching`, how long all workers hold
    it after the cancel.

    A sequence is known by its list of blocks, which reservation and slices share; an attempt by its
    number, which is the same at both workers. For clusters of one router.
    """

    def __init__(self, cluster: Any) -> None:
        service = cluster.decode[0]
        self._cluster = cluster
        self._after_abort: dict[int, int] = {}
        self._after_cancel: dict[int, int] = {}
        self._blocks: dict[str, list[list[int]]] = {}  # of each request; kept: ids stay theirs
        self._cancelled_s: dict[str, float] = {}
        self._numbers: dict[int, str] = {}  # request ids, by the numbers of their attempts
        self._held_s: dict[str, float] = {}
        self._handoff = service._handoff
        self._runner = service._engine._runner
        self._abort, self._step = self._handoff.abort, self._runner.step
        self._reserved = service._kept.reserved
        self._handoff.abort, self._runner.step = self._noted_abort, self._counted_step
        service._kept.reserved = self._noted_reserve

    def cancelled(self, request_id: str) -> None:
        """Its client cancels it now."""
        self._cancelled_s[request_id] = time.monotonic()
        for blocks in self._blocks.get(request_id, ()):
            self._after_cancel[id(blocks)] = 0

    @property
    def aborted(self) -> int:
        return len(self._after_abort)

    @property
    def most(self) -> int:
        """Steps that one of them had too many after its abort."""
        return max(self._after_abort.values(), default=0)

    @property
    def after_cancel(self) -> list[int]:
        """Steps that began after the cancel, of each that had blocks then or later; sorted."""
        return sorted(self._after_cancel.values())

    @property
    def held_s(self) -> list[float]:
        """From a cancel until neither worker had the request any more; of those that had it for
        long enough to be seen, sorted."""
        return sorted(at_s - self._cancelled_s[name] for name, at_s in self._held_s.items())

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        while True:
            now_s = time.monotonic()
            for _, number in self._held():
                name = self._numbers.get(number)
                if name in self._cancelled_s:
                    self._held_s[name] = now_s
            await asyncio.sleep(_LOOK_S)

    def _held(self) -> list[Any]:
        jobs = [key for worker in self._cluster.prefill for key in worker._schedule._jobs]
        return [*jobs, *self._handoff._by_key]

    def _noted_reserve(self, key: Any, reserve: Any) -> None:
        blocks, name = self._handoff._by_key[key].blocks, reserve.request_id
        self._numbers[reserve.key] = name
        self._blocks.setdefault(name, []).append(blocks)
        if name in self._cancelled_s:
            self._after_cancel[id(blocks)] = 0
        self._reserved(key, reserve)

    def _noted_abort(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        reservation = self._handoff._by_key.get(key)
        if reservation is not None:
            self._after_abort.setdefault(id(reservation.blocks), 0)
        return self._abort(key, *args, **kwargs)

    def _counted_step(self, slices: Any, *args: Any, **kwargs: Any) -> Any:
        """On the engine's thread."""
        sequences = [id(each.blocks) for each in slices]
        for blocks in sequences:
            if blocks in self._after_cancel:
                self._after_cancel[blocks] += 1
        try:
            return self._step(slices, *args, **kwargs)
        finally:
            for blocks in sequences:
                if blocks in self._after_abort:
                    self._after_abort[blocks] += 1
