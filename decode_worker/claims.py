"""Whose turn it is when a decode worker has too few free blocks for a large request.

A pure object; decode_worker/handoff.py asks it before it gives blocks. A router waits for the room
that a large request needs, but other routers do not know of it and fill what becomes free. So a
refused Reserve leaves a claim, and while the oldest claim stands, other sessions get only blocks
that it does not need. The claiming router is told when there are more free blocks and asks again;
a claim that is not asked for again ends soon, and none holds others up for long.
"""

from dataclasses import dataclass


@dataclass
class _Claim:
    blocks: int
    asked_at_ms: float  # the last time
    holds_until_ms: float  # after the first time that it was the oldest; inf before


class Claims:
    """One claim for each session, the oldest first. Times are in ms of any one monotonic clock.

    claim_ms: a claim that was not asked for again for so long ends.
    hold_ms: so long the oldest claim holds others up, at most.
    claims_max 0: there are none.
    """

    def __init__(self, *, claim_ms: int = 0, hold_ms: int = 0, claims_max: int = 0) -> None:
        self._claim_ms = claim_ms
        self._hold_ms = hold_ms
        self._claims_max = claims_max
        self._claims: dict[object, _Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def kept(self, session: object, now_ms: float) -> int:
        """How many free blocks `session` must leave for the oldest claim; 0 when that is its own,
        or there is none."""
        self._end_old(now_ms)
        if not self._claims:
            return 0
        oldest = next(iter(self._claims))
        return 0 if oldest == session else self._claims[oldest].blocks

    def refused(self, session: object, blocks: int, now_ms: float) -> None:
        """There was no room for so many blocks. A smaller request of a session that has a claim
        changes nothing: the large one waits before it."""
        claim = self._claims.get(session)
        if claim is None:
            if len(self._claims) < self._claims_max:
                self._claims[session] = _Claim(blocks, now_ms, float("inf"))
        elif blocks >= claim.blocks:
            claim.blocks, claim.asked_at_ms = blocks, now_ms
        self._end_old(now_ms)

    def granted(self, session: object, blocks: int) -> None:
        """It has got so many blocks: what it claimed, or something smaller."""
        claim = self._claims.get(session)
        if claim is not None and blocks >= claim.blocks:
            del self._claims[session]

    def leave(self, session: object) -> None:
        """The session has ended."""
        self._claims.pop(session, None)

    def _end_old(self, now_ms: float) -> None:
        """Ends claims that nobody asks for, and starts the time of the one that is then oldest."""
        for session, claim in list(self._claims.items()):
            if now_ms - claim.asked_at_ms >= self._claim_ms:
                del self._claims[session]
        while self._claims:
            session, claim = next(iter(self._claims.items()))
            claim.holds_until_ms = min(claim.holds_until_ms, now_ms + self._hold_ms)
            if now_ms < claim.holds_until_ms:
                return
            del self._claims[session]
