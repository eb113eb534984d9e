"""What the operator aims at: first tokens and answers within their targets, for as many as can be.

Pure, used by the Dispatcher alone. Without targets it does nothing. Goodput counts requests that
meet their targets, so a request that has missed its own takes nothing from those that still can
meet theirs: it waits for them, `late_wait_ms` at most.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import islice
from math import inf
from typing import NamedTuple

from kvrelay.config import RouterConfig
from router.policy import Aim
from router.prediction import prompt_share
from router.queue import WaitingQueue
from router.request import Request
from router.targets import any_targets, due_ms, waits_for_others_until_ms
from router.workers import Workers

_PACE_SAMPLE = 8  # workers of each role that say how fast prompts are computed


class _Kept(NamedTuple):
    """A request that is in time as far as it is known; the first to be let go of is the least."""

    priority: int  # negated: the least urgent goes first
    cost_ms: float  # negated: of these the one that takes the most
    place: int  # in the queue, negated


class Aims:
    def __init__(self, config: RouterConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers
        self.on = any_targets(config)

    def of(self, request: Request, now_ms: float) -> Aim | None:
        """What to place it by. None: there are no targets, or it has waited for others so long
        that they count no more."""
        if not self.on or now_ms > waits_for_others_until_ms(request, self._config):
            return None
        return Aim(due_ms(request, self._config) - now_ms, self._config.tpot_target_ms)

    def on_since(self, began_ms: float, now_ms: float) -> bool:
        """Whether all whose waits began then or later have something to meet."""
        return self.on and now_ms <= began_ms + self._config.late_wait_ms

    def next_of(self, queue: WaitingQueue, now_ms: float) -> Sequence[Request]:
        """Those to be looked at when there may be room, in order."""
        if not self._config.ttft_target_ms:
            return queue.heads()
        return self.in_order(queue.heads_and_late(now_ms), now_ms)

    def in_order(self, waiting: Sequence[Request], now_ms: float) -> Sequence[Request]:
        """Those who wait, in order: first those who can have their first tokens in time.

        As many as can be (Moore and Hodgson): in the order of the queue, and whenever somebody
        would be late, the longest of those so far, of the least urgent, is left out. So under more
        load than there is time for, it is the longest prompts that come late.
        """
        if not self._config.ttft_target_ms or len(waiting) < 2:
            return waiting
        token_ms, free_at_ms = self._pace()
        at_ms = first_ms = now_ms + free_at_ms  # first_ms: after those who go first in any case
        kept: list[_Kept] = []
        late: set[int] = set()
        for place, request in enumerate(waiting):
            cost_ms, due_at_ms = self._tokens(request) * token_ms, due_ms(request, self._config)
            if self.of(request, now_ms) is None or due_at_ms == inf:
                first_ms += cost_ms
            elif first_ms + cost_ms > due_at_ms:
                late.add(place)  # whoever is left out for it
                continue
            else:
                heappush(kept, _Kept(-request.priority, -cost_ms, -place))
            at_ms += cost_ms
            while kept and at_ms > due_at_ms:
                longest = heappop(kept)
                late.add(-longest.place)
                at_ms += longest.cost_ms
                if -longest.place == place:
                    break
        in_time = [r for place, r in enumerate(waiting) if place not in late]
        return in_time + [waiting[place] for place in sorted(late)]

    def _pace(self) -> tuple[float, float]:
        """(Time for one token of a prompt, time until the next prompt) where all workers that
        compute prompts share them. Looks at a few workers, whatever the size of the fleet."""
        prefill, decode = self._workers.prefill, self._workers.decode
        tokens: list[int] = []
        pace, workers = 0.0, 0.0  # tokens a millisecond of all that have time, their number
        each = max(1.0, len(prefill) / _PACE_SAMPLE)  # worker of the sample stands for so many
        for p in islice(prefill.values(), _PACE_SAMPLE):
            tokens.append(p.backlog_tokens)
            workers += each
            pace += each / p.rates.prompt_token_ms
        if self._config.local_prefill == "auto" or not prefill:
            each = max(1.0, len(decode) / _PACE_SAMPLE)
            for d in islice(decode.values(), _PACE_SAMPLE):
                if share := prompt_share(d.rates, d.decoding, self._config.tpot_target_ms):
                    tokens.append(d.backlog_tokens)
                    workers += each
                    pace += each * share / d.rates.prompt_token_ms
        return (1 / pace, min(tokens) * workers / pace) if pace else (0.0, 0.0)

    def _tokens(self, request: Request) -> int:
        """Of its prompt that are cached nowhere, as far as it was seen when it came."""
        if not request.uncached_tokens:
            choice = self._workers.choosing.choose(request)
            tokens = choice.placement.tokens if choice else request.prompt_tokens_now
            request.uncached_tokens = tokens
        return request.uncached_tokens
