"""Which workers take anything at all now: while none does, nobody who waits needs a look.

Pure, kept by router/workers.py. A worker that is here takes the smallest request that there could
be; whether it takes another one is for placement to say (router/policy.py). A figure that changes
costs nothing until somebody asks.
"""

from math import inf

from kvrelay.config import RouterConfig
from router.policy import Aim, Wish, computes_any, writes_any
from router.worker import DecodeWorker, Worker


class _Taking:
    """Numbers of workers that take what has this aim, or none."""

    def __init__(self, config: RouterConfig, aim: Aim | None) -> None:
        self._wish = Wish(1, 1, config.prefill_backlog_tokens, aim=aim)
        self.prompts: set[int] = set()  # prefill workers that compute them
        self.answers: set[int] = set()  # decode workers that write them
        self.both: set[int] = set()  # decode workers that compute the prompt as well

    def put(self, worker: Worker) -> None:
        number, view = worker.number, worker.view(0)
        computes = not worker.full and computes_any(view, self._wish)
        if not isinstance(worker, DecodeWorker):
            _keep(self.prompts, number, computes)
            return
        writes = not worker.full and writes_any(worker.view(0), self._wish)
        _keep(self.answers, number, writes)
        _keep(self.both, number, writes and computes)

    def drop(self, number: int) -> None:
        for numbers in (self.prompts, self.answers, self.both):
            numbers.discard(number)


class Openings:
    def __init__(self, config: RouterConfig) -> None:
        self._aimless = _Taking(config, None)
        aims = config.ttft_target_ms or config.tpot_target_ms
        self._aimed = _Taking(config, Aim(inf, config.tpot_target_ms)) if aims else None
        self._changed: dict[int, Worker] = {}  # since somebody asked

    def note(self, worker: Worker) -> None:
        """Its figures have changed."""
        self._changed[worker.number] = worker

    def drop(self, worker: Worker) -> None:
        """It is gone."""
        self._changed.pop(worker.number, None)
        self._aimless.drop(worker.number)
        if self._aimed is not None:
            self._aimed.drop(worker.number)

    def any(self, *, aimed: bool, local: bool) -> bool:
        """Whether some workers together take a request.

        aimed: one that has an aim; else one that may have none. local: decode workers may compute
        its prompt.
        """
        for worker in self._changed.values():
            self._aimless.put(worker)
            if self._aimed is not None:
                self._aimed.put(worker)
        self._changed.clear()
        takings = [] if aimed else [self._aimless]
        if self._aimed is not None:
            takings.append(self._aimed)
        return any((t.prompts and t.answers) or (local and t.both) for t in takings)


def _keep(numbers: set[int], number: int, here: bool) -> None:
    (numbers.add if here else numbers.discard)(number)
