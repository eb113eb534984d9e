"""Decides over the NCCL pairs of one worker: which may be opened, held, and closed to make room.

nccl_pairs.py carries the decisions out. No clock, no thread, no await: `now_s` is an argument, the
state changes before the answer is given, and whatever a rule forbids raises NcclError and changes
nothing. Who is refused uses another link.
"""

import enum
from dataclasses import dataclass

from kvrelay.lifecycle import advance
from kvrelay.transport.nccl_errors import NcclError


@dataclass(frozen=True)
class NcclLimits:
    pairs_max: int = 32  # open or opening
    hung_max: int = 4  # pairs whose abort did not end, until NCCL is not used any more
    peers_max: int = 1024  # remembered, for their epochs and back-off
    open_s: float = 5.0
    close_s: float = 2.0
    abort_s: float = 5.0
    backoff_s: float = 1.0  # after a first failure; twice as long after each further one
    backoff_max_s: float = 60.0


class PeerState(enum.Enum):
    APART = enum.auto()
    OPENING = enum.auto()
    OPEN = enum.auto()


class PeerEvent(enum.Enum):
    BEGIN = enum.auto()
    OPENED = enum.auto()
    ENDED = enum.auto()  # closed or failed


_S, _E = PeerState, PeerEvent
TRANSITIONS = {
    (_S.APART, _E.BEGIN): _S.OPENING,
    (_S.OPENING, _E.OPENED): _S.OPEN,
    (_S.OPENING, _E.ENDED): _S.APART,
    (_S.OPEN, _E.ENDED): _S.APART,
}


@dataclass
class _Peer:
    state: PeerState = PeerState.APART
    epoch: int = 0  # of its newest pair; each pair with this peer has a higher one
    holds: int = 0  # transfers that use the pair
    used_s: float = 0.0
    failures: int = 0  # since a transfer went well
    retry_s: float = 0.0  # not before


class PairBook:
    def __init__(self, limits: NcclLimits) -> None:
        self._limits = limits
        self._peers: dict[str, _Peer] = {}

    @property
    def open_pairs(self) -> int:
        """Open or opening."""
        return sum(peer.state is not PeerState.APART for peer in self._peers.values())

    def epoch(self, name: str) -> int:
        return self._peers[name].epoch

    def begin(self, name: str, now_s: float, hung: int) -> str | None:
        """P opens a pair, of the epoch that `epoch` says from now on. Returns the peer whose pair
        is to be closed first, which counts as closed already."""
        peer = self._peers.get(name, _Peer())
        if peer.state is not PeerState.APART:
            raise NcclError(f"the pair with {name} is {peer.state.name}")
        if now_s < peer.retry_s:
            raise NcclError(
                f"the pair with {name} failed {peer.failures} times; tried again in "
                f"{peer.retry_s - now_s:.1f} s"
            )
        return self._admit(name, peer.epoch + 1, now_s, hung)

    def accept(self, name: str, epoch: int, now_s: float, hung: int) -> str | None:
        """D opens a pair that P began; like `begin`. The older pair with `name` must be ended."""
        peer = self._peers.get(name, _Peer())
        if epoch <= peer.epoch:
            raise NcclError(f"{name} asks for epoch {epoch}; epoch {peer.epoch} has been")
        if peer.state is not PeerState.APART:
            raise NcclError(f"the pair with {name} is {peer.state.name}")
        return self._admit(name, epoch, now_s, hung)

    def opening(self, name: str, epoch: int) -> bool:
        """Whether the pair may be opened: it was begun or accepted, and has not ended."""
        peer = self._peers.get(name)
        return peer is not None and peer.epoch == epoch and peer.state is PeerState.OPENING

    def opened(self, name: str, epoch: int, now_s: float) -> None:
        assert self.opening(name, epoch)
        peer = self._peers[name]
        peer.state = advance(TRANSITIONS, peer.state, PeerEvent.OPENED)
        peer.used_s = now_s

    def ended(self, name: str, epoch: int, now_s: float, *, failed: bool) -> None:
        """The pair is gone or going. Said twice, or late, it changes nothing."""
        peer = self._peers.get(name)
        if peer is None or peer.epoch != epoch or peer.state is PeerState.APART:
            return
        peer.state = advance(TRANSITIONS, peer.state, PeerEvent.ENDED)
        peer.holds = 0
        if failed:
            wait_s = min(self._limits.backoff_s * 2**peer.failures, self._limits.backoff_max_s)
            peer.failures += 1
            peer.retry_s = now_s + wait_s

    def hold(self, name: str, now_s: float) -> bool:
        """Whether a transfer may use the pair; if so it is not closed to make room until
        `release`."""
        peer = self._peers.get(name)
        if peer is None or peer.state is not PeerState.OPEN:
            return False
        peer.holds += 1
        peer.used_s = now_s
        return True

    def release(self, name: str, epoch: int, now_s: float) -> None:
        peer = self._peers.get(name)
        if peer is None or peer.epoch != epoch or peer.state is not PeerState.OPEN:
            return  # it failed meanwhile, and took its holds along
        assert peer.holds > 0
        peer.holds -= 1
        peer.used_s = now_s
        peer.failures = 0

    def _admit(self, name: str, epoch: int, now_s: float, hung: int) -> str | None:
        if hung >= self._limits.hung_max:
            raise NcclError(f"{hung} NCCL pairs hang in this worker; no more are opened")
        victim = None
        if self.open_pairs >= self._limits.pairs_max:
            victim = self._least_used(PeerState.OPEN)
            if victim is None:
                raise NcclError(f"all {self._limits.pairs_max} NCCL pairs are in use")
            self.ended(victim, self._peers[victim].epoch, now_s, failed=False)
        peer = self._remember(name, now_s)
        peer.state = advance(TRANSITIONS, peer.state, PeerEvent.BEGIN)
        peer.epoch = epoch
        peer.used_s = now_s
        return victim

    def _remember(self, name: str, now_s: float) -> _Peer:
        if name not in self._peers and len(self._peers) >= self._limits.peers_max:
            # A worker that died comes back under another name, so the oldest is of no more use.
            forgotten = self._least_used(PeerState.APART)
            if forgotten is not None:
                del self._peers[forgotten]
        return self._peers.setdefault(name, _Peer(used_s=now_s))

    def _least_used(self, state: PeerState) -> str | None:
        """Of the peers in `state` that no transfer holds."""
        idle = [
            name for name, peer in self._peers.items() if peer.state is state and not peer.holds
        ]
        return min(idle, key=lambda name: self._peers[name].used_s, default=None)
