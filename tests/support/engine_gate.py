"""Holds a worker's engine in the middle of a step, for tests of what happens meanwhile."""

import asyncio
import threading
from typing import Any


class EngineGate:
    """Holds an engine inside the n-th step after `close`, on the engine's own thread."""

    def __init__(self, service: Any, *, at_step: int = 1) -> None:
        self.entered = asyncio.Event()
        self._open = threading.Event()
        self._steps = 0
        self._at_step = at_step
        self._loop = asyncio.get_running_loop()
        self._runner = service._engine._runner
        self._step = self._runner.step
        self._runner.step = self._gated

    def _gated(self, *args: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if self._steps == self._at_step:
            self._loop.call_soon_threadsafe(self.entered.set)
            self._open.wait(30)
        return self._step(*args, **kwargs)

    def open(self) -> None:
        self._open.set()
