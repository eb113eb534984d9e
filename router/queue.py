"""Requests that wait for a worker: who is next, who has waited long enough, how long it will take.

Pure, used by the Dispatcher alone; each call costs O(log n), amortised.

Order. Those who were placed before and lost their place come first. Then level by level: a level is
the priority, and each period of `queue_aging_ms` that somebody came earlier is worth one step of
it. So whoever has waited for as many periods as priorities lie between two requests goes before the
other, and nobody starves. Within a level the earliest deadline goes first, then who came first.

Room. A request that finds no room holds up nobody: those behind it are tried as well. But for one
that has waited for `queue_patience_ms` a worker may be kept (router/hold.py).
"""

from itertools import islice

from sortedcontainers import SortedDict, SortedList

from kvrelay.config import RouterConfig
from router.late import Key, Late
from router.request import Request
from router.targets import any_targets, due_ms, waits_for_others_until_ms

_NEWEST_SHARE = 0.1  # of the mean time between two departures that the newest makes up


class WaitingQueue:
    def __init__(self, config: RouterConfig) -> None:
        self.changed = False  # since somebody set it to False
        self._config = config
        self._order = SortedDict()  # of Key to Request
        self._keys: dict[Request, Key] = {}
        self._late = Late() if config.ttft_target_ms else None
        self._tokens = SortedList()  # of prompt and answer, of all who wait
        self._began_ms = SortedList()  # when their waits began
        self._in_turn = SortedList()  # keys of those whom nobody behind them has overtaken
        self._departure_ms: float | None = None  # mean time between two, while somebody waits
        self._since_ms = 0.0  # the last departure

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def full(self) -> bool:
        return len(self) >= self._config.queue_max

    @property
    def tokens(self) -> tuple[int, int]:
        """Of prompt and answer together: the fewest and the most that anybody waits with."""
        return self._tokens[0], self._tokens[-1]

    @property
    def began_ms(self) -> float:
        """When the longest wait began."""
        return float(self._began_ms[0])

    # ---- who comes and goes

    def push(self, request: Request) -> None:
        key = self._key(request)
        assert key not in self._order, "two requests of one number"
        self._keys[request] = key
        self._order[key] = request
        self._in_turn.add(key)
        self._tokens.add(request.tokens_max)
        self._began_ms.add(request.queued_at_ms)
        if self._late is not None:
            until_ms = waits_for_others_until_ms(request, self._config)
            self._late.add(key, request, due_ms(request, self._config), until_ms)
        self.changed = True

    def remove(self, request: Request) -> None:
        key = self._keys.pop(request)
        del self._order[key]
        self._in_turn.discard(key)
        self._tokens.remove(request.tokens_max)
        self._began_ms.remove(request.queued_at_ms)
        if self._late is not None:
            self._late.drop(key)
        if not self._keys:
            self._departure_ms = None  # who comes later may find everything different
        self.changed = True

    def depart(self, request: Request, now_ms: float) -> None:
        """It has found a place."""
        began_ms, self._since_ms = max(self._since_ms, request.queued_at_ms), now_ms
        if now_ms > request.queued_at_ms:  # else it says nothing of how long others will wait
            taken_ms = now_ms - began_ms
            mean_ms = taken_ms if self._departure_ms is None else self._departure_ms
            self._departure_ms = mean_ms + _NEWEST_SHARE * (taken_ms - mean_ms)
        del self._in_turn[: self._in_turn.bisect_left(self._keys[request])]  # it overtakes them
        self.remove(request)

    # ---- who is next

    def heads(self) -> list[Request]:
        """Those to be looked at when there may be room, in order."""
        return list(islice(self._order.values(), self._config.queue_scan_max))

    def heads_and_late(self, now_ms: float) -> list[Request]:
        """The same where first tokens have a target: as many who are late for it, and wait for
        others, beside those who are not. Or the late ones, who came first, would hide them."""
        assert self._late is not None
        return self._late.first(self._config.queue_scan_max, now_ms)

    def impatient(self, request: Request, now_ms: float) -> bool:
        """It has waited for so long that a worker may be kept for it."""
        return now_ms - request.queued_at_ms > self._patience_ms

    def any_impatient(self, now_ms: float) -> bool:
        return now_ms - self.began_ms > self._patience_ms

    @property
    def _patience_ms(self) -> int:
        config = self._config
        # With targets, who waits for longer than these is late, and others come first.
        return max(config.queue_patience_ms, config.late_wait_ms if any_targets(config) else 0)

    def wait_ms(self, request: Request, each_ms: float) -> float:
        """Predicted wait of a request that comes now: for all who would be before it.

        Not for those whom others overtake: it would too. each_ms: how long one takes, for as long
        as nobody has waited here and been seen to leave.
        """
        ahead = self._in_turn.bisect_left(self._key(request))
        return ahead * (each_ms if self._departure_ms is None else self._departure_ms)

    def all_ms(self) -> float | None:
        """Predicted time until all who wait now are gone; None when nobody can tell."""
        return None if self._departure_ms is None else len(self) * self._departure_ms

    def _key(self, request: Request) -> Key:
        """Not placed before; level; deadline; number of arrival."""
        arrived_at_ms = request.times.arrived_at_ms
        level = request.priority + int(arrived_at_ms // self._config.queue_aging_ms)
        return (request.key == 0, level, request.deadline_at_ms, request.number)

    def check(self) -> None:
        """Asserts that everybody waits once. For tests."""
        assert {r: k for k, r in self._order.items()} == self._keys
        assert set(self._in_turn) <= self._order.keys()
        assert len(self._in_turn) == len(set(self._in_turn))
        assert list(self._tokens) == sorted(r.tokens_max for r in self._keys)
        assert list(self._began_ms) == sorted(r.queued_at_ms for r in self._keys)
        if self._late is not None:
            self._late.check(self._keys)
