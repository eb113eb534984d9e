"""The requests that have not ended, and how they end.

Pure, used by the Dispatcher and Recovery alone.
"""

from collections.abc import Iterator

from router.attempts import Attempts
from router.commands import Command, Failed, Finished, Trouble
from router.queue import WaitingQueue
from router.request import Ending, Request, RequestEvent, RequestState
from router.workers import Workers


class Requests:
    def __init__(self, queue: WaitingQueue, workers: Workers, attempts: Attempts) -> None:
        self._queue = queue
        self._workers = workers
        self._attempts = attempts
        self._by_name: dict[tuple[str, str], Request] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Request]:
        """Those of now: some may end meanwhile."""
        return iter(list(self._by_name.values()))

    def __contains__(self, request: Request) -> bool:
        """Whether one of its name is here."""
        return request.name in self._by_name

    def get(self, name: tuple[str, str]) -> Request | None:
        return self._by_name.get(name)

    def has(self, request: Request) -> bool:
        """Whether this very one is here."""
        return self._by_name.get(request.name) is request

    @property
    def next_number(self) -> int:
        """Of the request that is added next."""
        return self._arrivals + 1

    def add(self, request: Request) -> None:
        request.number = self._arrivals = self.next_number
        self._by_name[request.name] = request

    # ---- their ends

    def handed_off(self, request: Request) -> list[Command]:
        """P has no more to say of it."""
        request.prefill_settled = True
        self._workers.claims.computed(request.key)
        self._let_suspects_pass(request)
        return self.finish_if_complete(request)

    def finish_if_complete(self, request: Request) -> list[Command]:
        """An answer is complete when D has ended it and P, if any, has said what it cost."""
        if request.ending is None or not request.prefill_settled:
            return []
        for worker_id in (request.prefill_id, request.decode_id):
            if worker_id is not None:
                self._workers.succeeded(worker_id)
        return self.finish(request, request.ending)

    def finish(self, request: Request, ending: Ending) -> list[Command]:
        self.end(request, RequestEvent.FINISH)
        return [Finished(request, ending)]

    def fail(
        self, request: Request, trouble: Trouble, event: RequestEvent = RequestEvent.GIVE_UP
    ) -> list[Command]:
        self.end(request, event)
        return [Failed(request, trouble)]

    def end(self, request: Request, event: RequestEvent) -> None:
        if request.state is RequestState.QUEUED:
            self._queue.remove(request)
        request.on(event)
        self._attempts.release(request)
        del self._by_name[request.name]
        self._let_suspects_pass(request)

    def _let_suspects_pass(self, request: Request) -> None:
        """Another one may have waited for this one's workers (router/strikes.py)."""
        if request.strikes:
            self._workers.stir()

    def check(self) -> None:
        """Asserts that those that wait are in the queue. For tests."""
        self._queue.check()
        waiting = [r for r in self._by_name.values() if r.state is RequestState.QUEUED]
        assert len(waiting) == len(self._queue)
