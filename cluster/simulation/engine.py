"""The simulated engine: steps that take virtual time and read and write simulated blocks.

In the place of EngineHost at both workers. A step takes what the cost model says, times the
slowness of the moment; it reads when it begins, writes when it ends, and checks both.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from cluster.simulation.memory import BLOCK_SIZE, SimPool
from cluster.simulation.model import EOS, sample
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.host import EngineHost
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step import CancelFlag, Slice, StepCancelledError
from kvrelay.engine.step_cost import StepCost, StepFit

_LOOKS = 2  # at the flag that cancels a step, while it runs


class EngineFaultError(RuntimeError):
    """A failure that the simulation has planned."""


@dataclass
class EngineFaults:
    """What is wrong with one engine now."""

    slowness: float = 1.0
    failing: int = 0  # steps that raise, from now on
    spoilt: int = 0  # tokens that are not numbers, from now on


class SimEngine(EngineHost):
    def __init__(self, pool: SimPool, cost: StepCost) -> None:
        # Not EngineHost's own: there is neither a model nor a thread.
        self.pool = pool
        self.fit = StepFit()
        self.faults = EngineFaults()
        self.steps = 0
        self._memory = pool
        self._cost = cost
        self._board = None
        self._runner = cast(Any, SimpleNamespace(context_limit=0))

    async def step(
        self,
        slices: Sequence[Slice],
        params: Sequence[SamplingParams | None],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        cancelled: CancelFlag | None = None,
    ) -> list[int | None]:
        begun = [_Begun(self._memory, s) for s in slices]
        sizes = [len(s.tokens) for s in slices]
        sequences = sizes.count(1)
        step_ms = self._cost.predict_ms(sum(sizes) - sequences, sequences) * self.faults.slowness
        for _ in range(_LOOKS):
            await asyncio.sleep(step_ms / 1000 / _LOOKS)
            if cancelled is not None and cancelled.is_set():
                for one in begun:  # it has written until now
                    one.check_leave()
                raise StepCancelledError
        self.steps += 1
        if self.faults.failing:
            self.faults.failing -= 1
            raise EngineFaultError("a planned failure")
        self.fit.measured(sum(sizes) - sequences, sequences, step_ms)
        states = [one.end() for one in begun]
        wanted = zip(states, params, positions, histories, strict=True)
        return [self._sampled(s, p, at, history) for s, p, at, history in wanted if p is not None]

    def _sampled(
        self, state: int, params: SamplingParams, position: int, history: TokenHistory | None
    ) -> int | None:
        if self.faults.spoilt:
            self.faults.spoilt -= 1
            return None
        answered, may_end = 0, True
        if history is not None:
            answered = int(history.counts.sum()) if params.penalises else 0
            may_end = history.sampled >= params.min_tokens or EOS not in params.eos_token_ids
        seed = params.seed if params.temperature else 0
        return sample(state, seed, position, answered, may_end=may_end)

    async def idle(self) -> None:
        """Steps end with the task that awaits them."""

    def close(self) -> None:
        """Nothing to give back."""


class _Begun:
    """One slice of a step under way."""

    def __init__(self, memory: SimPool, part: Slice) -> None:
        self._memory, self._part = memory, part
        self._blocks = list(part.blocks)
        self._state = memory.prefix(self._blocks, part.start, "a step")
        self._versions = memory.versions(self._blocks, part.start)
        last = (part.end - 1) // BLOCK_SIZE
        written = self._blocks[part.start // BLOCK_SIZE : last + 1]
        self._written = [(block, memory.owner(block)) for block in written]
        self.check_leave()

    def end(self) -> int:
        """Writes the slice's KV; the state after its last token."""
        memory, part = self._memory, self._part
        self.check_leave()
        if memory.versions(self._blocks, part.start) != self._versions:
            memory._violated(f"{memory._name}: what a step reads has changed during the step")
        return memory.extend(self._blocks, part.start, part.tokens, self._state)

    def check_leave(self) -> None:
        for block, owner in self._written:
            self._memory.check_leave(block, owner, "engine")
