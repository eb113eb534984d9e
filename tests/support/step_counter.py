"""Counts what an engine computes for sequences that were let go of."""

from typing import Any


class StepCounter:
    """Watches one decode service: the steps of each sequence that end after it was aborted.

    A sequence is known by its list of blocks, which reservation and slices share.
    """

    def __init__(self, service: Any) -> None:
        self._aborted: dict[int, list[int]] = {}  # by identity; kept, so that none is used again
        self._steps: dict[int, int] = {}
        self._handoff = service._handoff
        self._runner = service._engine._runner
        self._abort, self._step = self._handoff.abort, self._runner.step
        self._handoff.abort, self._runner.step = self._noted_abort, self._counted_step

    @property
    def aborted(self) -> int:
        return len(self._steps)

    @property
    def most(self) -> int:
        """Steps that one of them had too many."""
        return max(self._steps.values(), default=0)

    def _noted_abort(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        reservation = self._handoff._by_key.get(key)
        if reservation is not None and id(reservation.blocks) not in self._steps:
            self._aborted[id(reservation.blocks)] = reservation.blocks
            self._steps[id(reservation.blocks)] = 0
        return self._abort(key, *args, **kwargs)

    def _counted_step(self, slices: Any, *args: Any, **kwargs: Any) -> Any:
        """On the engine's thread."""
        try:
            return self._step(slices, *args, **kwargs)
        finally:
            for each in slices:
                if id(each.blocks) in self._steps:
                    self._steps[id(each.blocks)] += 1
