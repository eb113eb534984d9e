"""What becomes of a request when something goes wrong: a worker fails it, is lost, or says nothing.

Pure, used by the Dispatcher alone. An attempt that is given up ends at both workers, and the
request is placed again with its answer so far, or ends. A request may lose any number of workers:
only failures that workers report are counted against attempts_max.
"""

from collections.abc import Sequence

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode
from router.attempts import Attempts
from router.commands import (
    Command,
    ExhaustedTrouble,
    InvalidTrouble,
    PoisonTrouble,
    TakenOverTrouble,
    UnavailableTrouble,
)
from router.forecast import wait_is_over
from router.queue import WaitingQueue
from router.request import Request, RequestEvent, RequestState
from router.requests import Requests
from router.strikes import STRUCK, UNANSWERED, Strikes
from router.workers import Workers

_EVENTS = {
    FailureCode.FAILURE_CODE_PEER_LOST: RequestEvent.PEER_LOST,
    FailureCode.FAILURE_CODE_EXPIRED: RequestEvent.TIMEOUT,
}


class Recovery:
    def __init__(
        self,
        config: RouterConfig,
        requests: Requests,
        queue: WaitingQueue,
        workers: Workers,
        attempts: Attempts,
        strikes: Strikes,
    ) -> None:
        self._config = config
        self._requests = requests
        self._queue = queue
        self._workers = workers
        self._attempts = attempts
        self._strikes = strikes

    # ---- workers come back, drain, and are lost

    def worker_up(self, worker_id: str) -> None:
        """If it was here before it has not died: its session broke, or it hung."""
        self._strikes.take_back([worker_id], self._requests)

    def worker_drains(self, worker_id: str) -> None:
        for request in self._requests:
            waits = request.state is RequestState.QUEUED
            if waits or worker_id in (request.prefill_id, request.decode_id):
                request.on(RequestEvent.DRAIN)

    def worker_down(self, worker_id: str, now_ms: float, *, died: bool) -> list[Command]:
        """Every request that needs this worker is placed again.

        died: it has not ended on purpose.
        """
        struck: dict[Request, float] = {}
        lost: list[Request] = []
        commands: list[Command] = []
        for request in self._requests:
            weight = self._told_before(request, worker_id, now_ms)
            if request.state is RequestState.QUEUED:
                pass
            elif request.decode_id == worker_id:
                lost.append(request)
                reserving = request.state is RequestState.RESERVING
                weight = max(weight, UNANSWERED if reserving else STRUCK)
            elif request.prefill_id != worker_id or request.prefill_settled:
                pass
            elif request.state is RequestState.DECODING:
                commands += self._requests.handed_off(request)  # the decode worker has it all
            else:
                lost.append(request)
                if request.state is RequestState.PREFILLING:
                    weight = STRUCK
            if weight and request.complete() is None:
                struck[request] = weight
        cause = self._strikes.died(worker_id, struck, now_ms) if died else None
        if cause is not None:
            commands += self._condemn(cause)
        for request in lost:
            if request is not cause:
                commands += self._lost(request, worker_id, now_ms)
        return commands

    def _told_before(self, request: Request, worker_id: str, now_ms: float) -> float:
        """Its strikes where an attempt has ended by this same death, by word of the worker's peer,
        which knew before us. That attempt is no failure."""
        if request.suspect_id != worker_id:
            return 0.0
        request.suspect_id = ""
        if now_ms - request.suspected_at_ms > 2 * self._config.silence_ms:
            return 0.0
        request.spared += 1
        if request.state is RequestState.QUEUED:
            request.on(RequestEvent.PEER_LOST)
        return STRUCK

    def _condemn(self, cause: Request) -> list[Command]:
        """It is ended, and nobody else is to blame for the workers that it has cost."""
        died = list(cause.strikes)
        self._strikes.take_back(died, self._requests)
        trouble = f"{len(died)} workers died while they served this request; it is not tried again"
        return self._attempts.withdraw(cause) + self._requests.fail(cause, PoisonTrouble(trouble))

    def _lost(self, request: Request, worker_id: str, now_ms: float) -> list[Command]:
        """The wait goes on where it was, unless the attempt has brought a token: so even a request
        that loses every worker ends."""
        request.spared += 1
        request.failures[worker_id] += 1
        waited_ms = 0.0 if request.begun else request.placed_at_ms - request.queued_at_ms
        return self._again(request, RequestEvent.PEER_LOST, now_ms - waited_ms)

    # ---- workers fail

    def failed(
        self, request: Request, worker_id: str, failed: worker_pb2.Failed, now_ms: float
    ) -> list[Command]:
        if failed.code == FailureCode.FAILURE_CODE_INVALID:
            return self._attempts.withdraw(request) + self._requests.fail(
                request, InvalidTrouble(failed.message)
            )
        if failed.code == FailureCode.FAILURE_CODE_TAKEN_OVER:
            # Nobody is told: its workers go on with it for another router.
            return self._requests.fail(request, TakenOverTrouble())
        begun = request.state is RequestState.DECODING or request.begun
        if failed.code == FailureCode.FAILURE_CODE_EXHAUSTED and not begun:
            return self._refused(request, worker_id, now_ms)
        if failed.code == FailureCode.FAILURE_CODE_PEER_LOST:
            self._suspect(request, worker_id, now_ms)
        event = _EVENTS.get(failed.code, RequestEvent.FAILED)
        return self.retry(request, event, failed.message, now_ms)

    def _suspect(self, request: Request, worker_id: str, now_ms: float) -> None:
        """The peer of this worker may be gone."""
        if worker_id == request.prefill_id:
            request.suspect_id = request.decode_id
        else:
            request.suspect_id = "" if request.prefill_settled else request.prefill_id or ""
        request.suspected_at_ms = now_ms

    def _refused(self, request: Request, worker_id: str, now_ms: float) -> list[Command]:
        """A worker had no room. Nothing has failed: no attempt is counted, the wait goes on."""
        commands = self._attempts.withdraw(request, refused_by=worker_id)
        request.attempt -= 1
        request.on(RequestEvent.REFUSED)
        self._queue.push(request)
        return commands + self.end_wait(request, now_ms)

    def retry(
        self,
        request: Request,
        event: RequestEvent,
        why: str,
        now_ms: float,
        blamed: Sequence[str | None] = (),
    ) -> list[Command]:
        """blamed: workers that may be the cause; both of its pair unless it is known better."""
        for worker_id in blamed or (request.prefill_id, request.decode_id):
            if worker_id is not None:
                request.failures[worker_id] += 1
                self._workers.failed(worker_id, now_ms)
        failed = request.attempts_failed
        if failed >= self._config.attempts_max and request.complete() is None:
            trouble = UnavailableTrouble(f"failed {failed} times, last: {why}")
            return self._attempts.withdraw(request) + self._requests.fail(request, trouble)
        return self._again(request, event, now_ms)

    def _again(self, request: Request, event: RequestEvent, queued_at_ms: float) -> list[Command]:
        """The attempt is over. Its answer may be whole all the same; else it waits for another."""
        commands = self._attempts.withdraw(request)
        ending = request.complete()
        if ending is not None:
            return commands + self._requests.finish(request, ending)
        request.on(event)
        request.queued_at_ms = queued_at_ms
        self._queue.push(request)
        return commands

    # ---- waits have an end

    def expire(self, now_ms: float) -> list[Command]:
        """Ends the waits whose time is up."""
        if self._strikes.acquit(self._requests, now_ms):
            self._workers.stir()  # others may have waited for their workers
        self._strikes.forget()
        commands: list[Command] = []
        for request in self._requests:
            if request.state is RequestState.QUEUED:
                commands += self.end_wait(request, now_ms)
            elif (
                request.state is RequestState.RESERVING
                and now_ms - request.placed_at_ms > self._config.reserve_ms
            ):
                why = f"{request.decode_id} did not answer Reserve"
                blamed = [request.decode_id]
                commands += self.retry(request, RequestEvent.TIMEOUT, why, now_ms, blamed)
        return commands

    def end_wait(self, request: Request, now_ms: float) -> list[Command]:
        """Fails a queued request whose time is up, or that can no longer meet its deadline."""
        why = wait_is_over(request, now_ms, self._config)
        if not why:
            return []
        trouble = ExhaustedTrouble(why, self._queue.all_ms())
        return self._requests.fail(request, trouble, RequestEvent.TIMEOUT)
