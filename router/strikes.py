"""Which request workers die of: every death under a request is a strike for it.

Pure, used by Recovery and the Dispatcher. A worker may die of any request that was there, or of
none. Who has strikes_max, and nobody beside it as many, is taken for the cause. Where several have
as many they are suspects, and each goes on at workers where no other suspect is: the next death
tells. A worker that comes back as the same instance has not died, and its strikes are taken back.
Whoever has gone on elsewhere for acquit_ms, with tokens of the new attempt, is no longer suspected:
what kills a worker kills the next one where it goes on.
"""

from collections.abc import Iterable, Mapping

from kvrelay.config import RouterConfig
from router.request import Request, RequestState

STRUCK = 1.0
# It had been asked, and had not answered: it may have been dead already. That ranks, and proves
# nothing.
UNANSWERED = 0.5
_TOKENS_MIN = 2  # of an attempt that goes on: the first may be the prefill worker's

_PLACED = (RequestState.RESERVING, RequestState.PREFILLING, RequestState.DECODING)


class Strikes:
    def __init__(self, config: RouterConfig) -> None:
        self._max = config.strikes_max
        self._acquit_ms = config.acquit_ms
        self._suspects: set[Request] = set()

    def died(self, worker_id: str, there: Mapping[Request, float], now_ms: float) -> Request | None:
        """The cause, where it is known. there: whom the worker served, and how much it counts."""
        for request, weight in there.items():
            if self._goes_on(request, now_ms):
                request.strikes.clear()
            request.strikes[worker_id] = weight
        ranked = sorted(there, key=strikes_of, reverse=True)
        if not ranked or not self._suspected(ranked[0]):
            return None
        if len(ranked) == 1 or strikes_of(ranked[1]) < strikes_of(ranked[0]):
            return ranked[0]
        self._suspects.update(filter(self._suspected, ranked))
        return None

    def acquit(self, requests: Iterable[Request], now_ms: float) -> bool:
        """Takes back the strikes of those that go on; True when there are any."""
        acquitted = [r for r in requests if r.strikes and self._goes_on(r, now_ms)]
        for request in acquitted:
            request.strikes.clear()
        return bool(acquitted)

    def _goes_on(self, request: Request, now_ms: float) -> bool:
        brought = len(request.answer) - request.base
        lived_ms = now_ms - request.placed_at_ms
        return brought >= _TOKENS_MIN and lived_ms >= self._acquit_ms

    def _suspected(self, request: Request) -> bool:
        """As many workers have died under it, beyond doubt, as it takes."""
        return list(request.strikes.values()).count(STRUCK) >= self._max

    def take_back(self, worker_ids: Iterable[str], requests: Iterable[Request]) -> None:
        """These workers have not died, or not of these requests."""
        workers = list(worker_ids)
        for request in requests:
            for worker_id in workers:
                request.strikes.pop(worker_id, None)

    def apart(self, request: Request) -> set[str]:
        """The workers that a suspect may not go to; none for anybody else."""
        self.forget()
        if request not in self._suspects:
            return set()
        others = [r for r in self._suspects if r is not request and r.state in _PLACED]
        decode = {other.decode_id for other in others}
        return decode | {r.prefill_id for r in others if r.prefill_id and not r.prefill_settled}

    def forget(self) -> None:
        """Those that have ended, or are cleared."""
        if not self._suspects:
            return
        self._suspects = {
            request
            for request in self._suspects
            if request.state is not RequestState.ENDED and self._suspected(request)
        }


def strikes_of(request: Request) -> float:
    return sum(request.strikes.values())
