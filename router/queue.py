"""Requests that wait for a worker: who is next, who has waited long enough, how long it will take.

Pure, used by the Dispatcher alone; each call costs O(log n).

Order. Those who were placed before and lost their place come first. Then level by level: a level is
the priority, and each period of `queue_aging_ms` that somebody came earlier is worth one step of
it. So whoever has waited for as many periods as priorities lie between two requests goes before the
other, and nobody starves. Within a level the earliest deadline goes first, then who came first.

Room. A request that finds no room holds up nobody: those behind it are tried as well. But for one
that has waited for `queue_patience_ms` a worker may be kept (router/hold.py).
"""

from collections.abc import Callable
from itertools import islice

from sortedcontainers import SortedDict, SortedList

from kvrelay.config import RouterConfig
from router.request import Request

_NEWEST_SHARE = 0.1  # of the mean time between two departures that the newest makes up

# Not placed before; level; deadline; number of arrival.
_Key = tuple[bool, int, float, int]


class WaitingQueue:
    def __init__(self, config: RouterConfig) -> None:
        self.changed = False  # since somebody set it to False
        self._config = config
        self._order = SortedDict()  # of _Key to Request
        self._keys: dict[Request, _Key] = {}
        self._overtaken = SortedList()  # keys of those whom others have left behind
        self._departure_ms: float | None = None  # mean time between two, while somebody waits
        self._since_ms = 0.0  # the last departure

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def full(self) -> bool:
        return len(self) >= self._config.queue_max

    # ---- who comes and goes

    def push(self, request: Request) -> None:
        key = self._key(request)
        assert key not in self._order, "two requests of one number"
        self._keys[request] = key
        self._order[key] = request
        self.changed = True

    def remove(self, request: Request) -> None:
        key = self._keys.pop(request)
        del self._order[key]
        self._overtaken.discard(key)
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
        before = self._order.bisect_left(self._keys[request])
        for key in islice(self._order, before):
            if key not in self._overtaken:
                self._overtaken.add(key)
        self.remove(request)

    # ---- who is next

    def heads(self, is_late: Callable[[Request], bool] | None = None) -> list[Request]:
        """Those to be looked at when there may be room, in order.

        is_late: who waits for others, and so takes no place of theirs; as many of them come too.
        """
        most, waiting = self._config.queue_scan_max, self._order.values()
        if is_late is None or len(self) <= most:
            return list(islice(waiting, most))
        left = {True: most, False: most}
        heads = []
        for request in waiting:
            late = is_late(request)
            left[late] -= 1
            if left[late] >= 0:
                heads.append(request)
            elif max(left.values()) <= 0:
                break
        return heads

    def impatient(self, request: Request, now_ms: float) -> bool:
        """It has waited for so long that a worker may be kept for it."""
        config = self._config
        aims = config.ttft_target_ms or config.tpot_target_ms
        # With targets, who waits for longer than these is late, and others come first.
        patience_ms = max(config.queue_patience_ms, config.late_wait_ms if aims else 0)
        return now_ms - request.queued_at_ms > patience_ms

    def wait_ms(self, request: Request, each_ms: float) -> float:
        """Predicted wait of a request that comes now: for all who would be before it.

        Not for those whom others overtake: it would too. each_ms: how long one takes, for as long
        as nobody has waited here and been seen to leave.
        """
        key = self._key(request)
        ahead = self._order.bisect_left(key) - self._overtaken.bisect_left(key)
        return ahead * (each_ms if self._departure_ms is None else self._departure_ms)

    def all_ms(self) -> float | None:
        """Predicted time until all who wait now are gone; None when nobody can tell."""
        return None if self._departure_ms is None else len(self) * self._departure_ms

    def _key(self, request: Request) -> _Key:
        arrived_at_ms = request.times.arrived_at_ms
        level = request.priority + int(arrived_at_ms // self._config.queue_aging_ms)
        return (request.key == 0, level, request.deadline_at_ms, request.number)

    def check(self) -> None:
        """Asserts that everybody waits once. For tests."""
        assert {r: k for k, r in self._order.items()} == self._keys
        assert set(self._overtaken) <= self._order.keys()
        assert len(self._overtaken) == len(set(self._overtaken))
