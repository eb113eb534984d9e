"""Which workers take anything at all now: while none does, nobody who waits needs a look.

Pure, kept by router/workers.py. A worker that is here takes the smallest request that there could
be; whether it takes another one is for placement to say (router/policy.py). A figure that changes
costs nothing until somebody asks.
"""

from collections.abc import Sequence
from math import inf

from kvrelay.config import RouterConfig
from router.policy import Aim, Wish, computes_any, writes_any
from router.prediction import PrefillView
from router.targets import any_targets
from router.worker import Worker


class _Taking:
    """Numbers of workers that take what has this aim, or none."""

    def __init__(self, config: RouterConfig, aim: Aim | None) -> None:
        self._wish = Wish(1, 1, config.prefill_backlog_tokens, aim=aim)
        self.prompts: set[int] = set()  # prefill workers that compute them
        self.answers: set[int] = set()  # decode workers that write them
        self.both: set[int] = set()  # decode workers that compute the prompt as well

    def put(self, worker: Worker) -> bool:
        """Whether it takes something that it did not take before."""
        number, view = worker.number, worker.view(0)
        computes = not view.full and computes_any(view, self._wish)
        if isinstance(view, PrefillView):
            return _keep(self.prompts, number, computes)
        writes = not view.full and writes_any(view, self._wish)
        entered = _keep(self.answers, number, writes)
        return _keep(self.both, number, writes and computes) or entered

    def drop(self, number: int) -> None:
        for numbers in (self.prompts, self.answers, self.both):
            numbers.discard(number)

    def numbers(self) -> tuple[set[int], ...]:
        return set(self.prompts), set(self.answers), set(self.both)


class Openings:
    def __init__(self, config: RouterConfig) -> None:
        self._aimless = _Taking(config, None)
        aim = Aim(inf, config.tpot_target_ms)
        self._aimed = _Taking(config, aim) if any_targets(config) else None
        self._changed: dict[int, Worker] = {}  # since somebody asked
        self._entered = False

    def note(self, worker: Worker) -> None:
        """Its figures have changed."""
        self._changed[worker.number] = worker

    def drop(self, worker: Worker) -> None:
        """It is gone."""
        self._changed.pop(worker.number, None)
        for taking in self._takings(aimed=False):
            taking.drop(worker.number)

    @property
    def entered(self) -> bool:
        """Whether a worker takes something that it did not take at the last `forget_entered`."""
        self._look()
        return self._entered

    def forget_entered(self) -> None:
        self._look()
        self._entered = False

    def any(self, *, aimed: bool, local: bool) -> bool:
        """Whether some workers together take a request.

        aimed: one that has an aim; else one that may have none. local: decode workers may compute
        its prompt.
        """
        self._look()
        return any(
            (t.prompts and t.answers) or (local and t.both) for t in self._takings(aimed=aimed)
        )

    def _look(self) -> None:
        for worker in self._changed.values():
            for taking in self._takings(aimed=False):
                self._entered |= taking.put(worker)
        self._changed.clear()

    def check(self, workers: Sequence[Worker]) -> None:
        """Asserts that no change of these workers, all there are, was missed. For tests."""
        self._look()
        known = [taking.numbers() for taking in self._takings(aimed=False)]
        for worker in workers:
            self.note(worker)
        self._look()
        assert known == [taking.numbers() for taking in self._takings(aimed=False)]
        assert set().union(*known[0]) <= {worker.number for worker in workers}

    def _takings(self, *, aimed: bool) -> list[_Taking]:
        takings = [] if aimed else [self._aimless]
        if self._aimed is not None:
            takings.append(self._aimed)
        return takings


def _keep(numbers: set[int], number: int, here: bool) -> bool:
    """Whether it is new there."""
    new = here and number not in numbers
    (numbers.add if here else numbers.discard)(number)
    return new
