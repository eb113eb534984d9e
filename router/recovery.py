"""What becomes of a request when something goes wrong: a worker fails it, is lost, or says nothing.

Pure, used by the Dispatcher alone. An attempt that is given up ends at both workers, and the
request is placed again with its answer so far, or ends.
"""

from collections.abc import Sequence

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode
from router.attempts import Attempts
from router.commands import (
    Command,
    ExhaustedTrouble,
    Finished,
    InvalidTrouble,
    TakenOverTrouble,
    UnavailableTrouble,
)
from router.forecast import wait_is_over
from router.queue import WaitingQueue
from router.request import Request, RequestEvent, RequestState
from router.requests import Requests
from router.workers import Workers


class Recovery:
    def __init__(
        self,
        config: RouterConfig,
        requests: Requests,
        queue: WaitingQueue,
        workers: Workers,
        attempts: Attempts,
    ) -> None:
        self._config = config
        self._requests = requests
        self._queue = queue
        self._workers = workers
        self._attempts = attempts

    # ---- workers are lost

    def worker_down(self, worker_id: str, now_ms: float) -> list[Command]:
        """Every request that needs this worker is placed again."""
        commands: list[Command] = []
        for request in self._attempts.all():
            if request.decode_id == worker_id:
                commands += self._lost(request, worker_id, "decode", now_ms)
            elif request.prefill_id == worker_id and request.state is RequestState.DECODING:
                commands += self._requests.handed_off(request)
            elif request.prefill_id == worker_id and not request.prefill_settled:
                commands += self._lost(request, worker_id, "prefill", now_ms)
        return commands

    def _lost(self, request: Request, worker_id: str, role: str, now_ms: float) -> list[Command]:
        if worker_id in request.suspects:
            # Its peer knew before us, and the attempt since then met the same death.
            request.suspects.clear()
            request.attempt -= 1
        return self.retry(request, f"{role} worker {worker_id} was lost", now_ms, [worker_id])

    # ---- workers fail

    def failed(
        self, request: Request, worker_id: str, failed: worker_pb2.Failed, now_ms: float
    ) -> list[Command]:
        if failed.code == FailureCode.FAILURE_CODE_INVALID:
            return self._attempts.withdraw(request) + self._requests.fail(
                request, InvalidTrouble(failed.message)
            )
        if failed.code == FailureCode.FAILURE_CODE_TAKEN_OVER:
            commands = self._attempts.withdraw(request)
            return commands + self._requests.fail(request, TakenOverTrouble())
        begun = request.state is RequestState.DECODING or len(request.answer) > request.base
        if failed.code == FailureCode.FAILURE_CODE_EXHAUSTED and not begun:
            return self._refused(request, worker_id, now_ms)
        if failed.code == FailureCode.FAILURE_CODE_PEER_LOST:
            request.suspects = {request.decode_id, request.prefill_id or request.decode_id}
        return self.retry(request, failed.message, now_ms)

    def _refused(self, request: Request, worker_id: str, now_ms: float) -> list[Command]:
        """A worker had no room. Nothing has failed: no attempt is counted, the wait goes on."""
        commands = self._attempts.withdraw(request, refused_by=worker_id)
        request.attempt -= 1
        request.on(RequestEvent.RETRY)
        self._queue.push(request)
        return commands + self.end_wait(request, now_ms)

    def retry(
        self, request: Request, why: str, now_ms: float, blamed: Sequence[str | None] = ()
    ) -> list[Command]:
        """blamed: workers that may be the cause; both of its pair unless it is known better."""
        for worker_id in blamed or (request.prefill_id, request.decode_id):
            if worker_id is not None:
                request.failures[worker_id] += 1
                self._workers.failed(worker_id, now_ms)
        commands = self._attempts.withdraw(request)
        ending = request.complete()
        if ending is not None:
            self._requests.end(request)
            return [*commands, Finished(request, ending)]
        if request.attempt >= self._config.attempts_max:
            trouble = UnavailableTrouble(f"failed {request.attempt} times, last: {why}")
            return commands + self._requests.fail(request, trouble)
        request.on(RequestEvent.RETRY)
        request.queued_at_ms = now_ms
        self._queue.push(request)
        return commands

    # ---- waits have an end

    def expire(self, now_ms: float) -> list[Command]:
        """Ends the waits whose time is up."""
        commands: list[Command] = []
        for request in self._requests:
            if request.state is RequestState.QUEUED:
                commands += self.end_wait(request, now_ms)
            elif (
                request.state is RequestState.RESERVING
                and now_ms - request.placed_at_ms > self._config.reserve_ms
            ):
                why = f"{request.decode_id} did not answer Reserve"
                commands += self.retry(request, why, now_ms, [request.decode_id])
        return commands

    def end_wait(self, request: Request, now_ms: float) -> list[Command]:
        """Fails a queued request whose time is up, or that can no longer meet its deadline."""
        why = wait_is_over(request, now_ms, self._config)
        if not why:
            return []
        return self._requests.fail(request, ExhaustedTrouble(why, self._queue.all_ms()))
