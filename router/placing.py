"""The placing of those who wait: who is looked at, and when.

Pure, used by the Dispatcher alone. Under overload something happens all the time and hardly anybody
finds a place, so nobody is looked at while no worker takes anything (router/openings.py), and a
look tries a few of them at most.
"""

from kvrelay.config import RouterConfig
from router.aims import Aims
from router.attempts import Attempts
from router.commands import Command, InvalidTrouble
from router.hold import Hold
from router.policy import Choice
from router.queue import WaitingQueue
from router.recovery import Recovery
from router.request import Request
from router.requests import Requests
from router.strikes import Strikes
from router.workers import Wanted, Workers


class Placing:
    def __init__(
        self,
        config: RouterConfig,
        queue: WaitingQueue,
        workers: Workers,
        attempts: Attempts,
        requests: Requests,
        strikes: Strikes,
        recovery: Recovery,
    ) -> None:
        self._config = config
        self._queue = queue
        self._workers = workers
        self._attempts = attempts
        self._requests = requests
        self._strikes = strikes
        self._recovery = recovery
        self._aims = Aims(config, workers)
        self.hold = Hold(config)

    @property
    def to_place(self) -> bool:
        """Whether `pump` may find a place for somebody who waits."""
        return len(self._queue) > 0 and (
            self._queue.changed or self.hold.waits_no_more or self._workers.room_grew
        )

    def pump(self, now_ms: float) -> list[Command]:
        """Places a few of those who wait, as far as there is room."""
        self._workers.forgive(now_ms)
        self.hold.end_if_over(now_ms)
        if not len(self._queue):
            return []
        wanted = Wanted(*self._queue.tokens, self._aims.on_since(self._queue.began_ms, now_ms))
        self._workers.looked_at()
        self._queue.changed = False
        keep = self.hold.may_begin(now_ms) and self._queue.any_impatient(now_ms)
        if keep or self._too_long(wanted.tokens_most) or self._workers.may_take(wanted):
            return self._look(now_ms, keep=keep)
        return []

    def keep_no_longer(self, worker_id: str, now_ms: float) -> None:
        """It takes nothing any more."""
        if self.hold.worker_id == worker_id:
            self.hold.end(now_ms)

    def pass_time(self, now_ms: float) -> None:
        """A worker that was kept for long enough is there for all who wait, now."""
        if self.hold.end_if_over(now_ms):
            self._workers.stir()

    def _too_long(self, tokens: int) -> bool:
        """Longer than anything that was ever connected. Not than what is connected now: a larger
        worker that died is being replaced. And nothing is known while there is no worker."""
        workers = self._workers
        return workers.context_tokens is not None and tokens > workers.context_tokens_seen

    def _look(self, now_ms: float, *, keep: bool) -> list[Command]:
        """keep: a worker may be kept for somebody."""
        commands: list[Command] = []
        left = self._config.queue_lookahead
        for request in self._aims.next_of(self._queue, now_ms):
            if left == 0:
                # Without a success the next call would find no more than this one.
                self._queue.changed = bool(commands)
                return commands
            without = self._strikes.apart(request) | self.hold.kept_from(request)
            room = self._workers.choosing.have_room(request, without)
            left -= room
            if self._too_long(request.tokens_max):
                commands += self._fail_long(request)
            elif room:
                commands += self._try(request, without, now_ms)
            elif keep:
                commands += self._keep_one(request, None, without, now_ms)
        self._queue.changed = False
        return commands

    def _fail_long(self, request: Request) -> list[Command]:
        tokens, most = request.tokens_max, self._workers.context_tokens_seen
        trouble = f"prompt and answer may need {tokens} tokens, the workers hold {most}"
        return self._requests.fail(request, InvalidTrouble(trouble))

    def _try(self, request: Request, without: set[str], now_ms: float) -> list[Command]:
        """Places a waiting request, or ends it where that is too late; [] when it waits on.

        without: workers that it may not go to.
        """
        choice = self._workers.choosing.choose(request, without, self._aims.of(request, now_ms))
        if choice is None or not choice.now:
            return self._keep_one(request, choice, without, now_ms)
        if ended := self._recovery.end_wait(request, now_ms):
            return ended
        self._queue.depart(request, now_ms)
        return [self._attempts.begin(request, choice.placement, now_ms)]

    def _keep_one(
        self, request: Request, choice: Choice | None, without: set[str], now_ms: float
    ) -> list[Command]:
        """Keeps a worker for a request that has waited too long, if none is kept.

        A decode worker is asked at once, without room: it refuses, and knows then who waits for
        room there, which other routers want too.
        """
        if not (self.hold.may_begin(now_ms) and self._queue.impatient(request, now_ms)):
            return []
        worker_id = self._workers.choosing.worth_keeping(request, choice, without)
        if not worker_id:
            return []
        self.hold.begin(request, worker_id, now_ms)
        if choice is not None:
            return []
        asked = self._workers.choosing.choose_at(worker_id, request, without)
        if asked is None or not asked.now:
            return []
        self._queue.remove(request)
        return [self._attempts.begin(request, asked.placement, now_ms)]
