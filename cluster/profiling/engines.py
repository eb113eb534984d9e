"""Two engines on cores of their own, as the workers of 1P + 1D have them, and what they are asked.

Called by measuring.py. Steps are timed in one while the other rests, or is busy.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.bench.report import BenchError
from cluster.bench.router_processes import Child
from cluster.cores import share_out
from cluster.profiling.setup import EngineInfo, EngineSetup
from cluster.profiling.steps import StepShape

_MODULE = "cluster.profiling.engine_process"
_ROLES = ("prefill", "decode")


class Engine:
    """One of them. Made by `started`."""

    def __init__(self, role: str, setup: EngineSetup) -> None:
        self._child = Child(f"the engine for {role}", _MODULE, setup.to_json() + "\n")

    def info(self) -> EngineInfo:
        """Waits until the model is loaded. Raises BenchError when it cannot be."""
        return EngineInfo.from_json(self._child.ready())

    def make_pool(self, blocks: int) -> None:
        self._child.ask("pool", blocks=blocks)

    def times_ms(self, shape: StepShape, turn_s: float) -> list[float]:
        """What one step after another takes, for so long."""
        return self._child.ask("step", shape=shape.to_json(), turn_s=turn_s)["ms"]

    @contextlib.contextmanager
    def busy(self, shape: StepShape) -> Iterator[None]:
        """Within, it makes one step after another."""
        self._child.ask("busy", shape=shape.to_json())
        try:
            yield
        finally:
            self._child.ask("rest")

    def end(self) -> None:
        self._child.end()


@dataclass(frozen=True)
class Engines:
    """prefill is the one that steps are timed in; decode is None where there are not enough cores
    for two, so that the one would only wait for the other."""

    prefill: Engine
    decode: Engine | None
    info: EngineInfo
    cores: tuple[tuple[int, ...], ...]

    def make_pools(self, blocks: int) -> None:
        for engine in filter(None, (self.prefill, self.decode)):
            engine.make_pool(blocks)


@contextlib.contextmanager
def started(setup: EngineSetup) -> Iterator[Engines]:
    """setup: its cores are chosen here. Raises BenchError when the model cannot be loaded."""
    slots = share_out(_ROLES, setup.threads, os.sched_getaffinity(0))
    pinned = [slot for slot in slots if slot.cores]
    with contextlib.ExitStack() as stack:
        engines = []
        for slot in pinned or slots[:1]:
            engine = Engine(slot.role, replace(setup, cores=slot.cores))
            stack.callback(engine.end)
            engines.append(engine)
        infos = [engine.info() for engine in engines]
        if any(info.layout != infos[0].layout for info in infos):
            raise BenchError("the model has changed while it was loaded: try again")
        second = engines[1] if len(engines) > 1 else None
        yield Engines(engines[0], second, infos[0], tuple(slot.cores for slot in pinned))
