"""The search for the highest rate at which enough requests meet their SLO. Pure.

run.py measures at `next_rate`, tells `note` what it saw, and goes on until there is no next rate.
"""

_STEP = 1.4  # from one rate to the next, while only one side of the goal is known
_STEPS_MAX = 8  # of these, in either direction


class Search:
    """goal: the share of requests that have to meet the SLO. Rates within `precision` of each other
    are one; runs_max bounds how often it asks."""

    def __init__(
        self, first_rate: float, *, goal: float = 0.9, precision: float = 0.05, runs_max: int = 6
    ) -> None:
        self._first_rate = first_rate
        self._goal = goal
        self._precision = precision
        self._runs_max = runs_max
        self._shares: dict[float, float] = {}  # that met it, by rate

    def note(self, rate: float, share: float) -> None:
        self._shares[rate] = share

    @property
    def failed_at(self) -> float | None:
        """The lowest rate at which too few met it."""
        return min((r for r, share in self._shares.items() if share < self._goal), default=None)

    @property
    def passed_at(self) -> float | None:
        """The highest rate at which enough met it, and at every lower one that was tried."""
        end = self.failed_at
        rates = [r for r, s in self._shares.items() if s >= self._goal and (not end or r < end)]
        return max(rates, default=None)

    def next_rate(self) -> float | None:
        """None: it is found, or there is nothing to find."""
        if len(self._shares) >= self._runs_max:
            return None
        low, high = self.passed_at, self.failed_at
        if low is None and high is None:
            return self._first_rate
        if low is None or high is None:
            rate = high / _STEP if low is None and high is not None else (low or 0.0) * _STEP
            bound = _STEP**_STEPS_MAX
            within = self._first_rate / bound <= rate <= self._first_rate * bound
            return rate if within else None
        if high <= low * (1 + self._precision):
            return None
        # Where a line through both shares meets the goal, but well within the two.
        return low * (high / low) ** min(0.75, max(0.25, self._crossing(low, high)))

    @property
    def goodput(self) -> float:
        """Requests a second: where the share meets the goal, between the rates on both sides of it;
        0 where no rate was low enough."""
        low, high = self.passed_at, self.failed_at
        if low is None:
            return 0.0
        return low if high is None else low * (high / low) ** self._crossing(low, high)

    def _crossing(self, low: float, high: float) -> float:
        """As a part of the way from low to high, on a scale of ratios."""
        above, below = self._shares[low] - self._goal, self._goal - self._shares[high]
        return above / (above + below)
