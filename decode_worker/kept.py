"""Answers of a decode worker that a router may adopt when the one that asked for them is gone.

A pure object; decode_worker/service.py tells it what happens to each request attempt from its
Reserve on, and asks it whose the attempt is now. An attempt keeps its key here for life, whoever
adopts it, so that neither ledger nor batch nor a step under way has to know of it; `holder` says
what the router of the moment calls it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from decode_worker.batch import Ending
from decode_worker.reservation import Key
from kvrelay.lifecycle import advance
from kvrelay.wire import worker_pb2

# Tenant, request id and nonce. The first two may be those of another request at another router.
Name = tuple[str, str, int]


class KeptState(Enum):
    PENDING = "pending"  # its prompt is not here yet: nothing to adopt
    ANSWERING = "answering"
    ORPHANED = "orphaned"  # answering, and its router is gone
    WHOLE = "whole"  # the answer has ended; its router has not acknowledged it
    LEFT = "left"  # whole, and its router is gone
    GONE = "gone"


class KeptEvent(Enum):
    BEGIN = "begin"  # the prompt is here, and the first token
    END = "end"
    ROUTER_LOST = "router_lost"
    ADOPT = "adopt"
    ACKNOWLEDGE = "acknowledge"
    TIMEOUT = "timeout"  # nobody came for it
    LET_GO = "let_go"  # cancelled, failed, or crowded out


_S, _E = KeptState, KeptEvent

TRANSITIONS: dict[tuple[KeptState, KeptEvent], KeptState] = {
    (_S.PENDING, _E.BEGIN): _S.ANSWERING,
    (_S.PENDING, _E.ROUTER_LOST): _S.GONE,
    (_S.PENDING, _E.LET_GO): _S.GONE,
    (_S.ANSWERING, _E.END): _S.WHOLE,
    (_S.ANSWERING, _E.ADOPT): _S.ANSWERING,  # its router may hang
    (_S.ANSWERING, _E.ROUTER_LOST): _S.ORPHANED,
    (_S.ANSWERING, _E.LET_GO): _S.GONE,
    (_S.ORPHANED, _E.END): _S.LEFT,
    (_S.ORPHANED, _E.ADOPT): _S.ANSWERING,
    (_S.ORPHANED, _E.TIMEOUT): _S.GONE,
    (_S.ORPHANED, _E.LET_GO): _S.GONE,
    (_S.WHOLE, _E.ADOPT): _S.WHOLE,
    (_S.WHOLE, _E.ACKNOWLEDGE): _S.GONE,
    (_S.WHOLE, _E.ROUTER_LOST): _S.LEFT,
    (_S.WHOLE, _E.LET_GO): _S.GONE,
    (_S.LEFT, _E.ADOPT): _S.WHOLE,
    (_S.LEFT, _E.TIMEOUT): _S.GONE,
    (_S.LEFT, _E.LET_GO): _S.GONE,
}


@dataclass(eq=False)
class KeptAnswer:
    """One request attempt as another router would get it."""

    key: Key
    holder: Key | None  # what its router calls it; None: it has none
    reserve: worker_pb2.Reserve
    state: KeptState = KeptState.PENDING
    token_ids: list[int] = field(default_factory=list)  # grows with the answer
    ending: Ending = Ending.NONE
    ends_ms: float = inf
    router: str = ""  # that it has lost, if that one said who it is

    @property
    def name(self) -> Name:
        return self.reserve.tenant, self.reserve.request_id, self.reserve.nonce

    @property
    def known(self) -> int:
        """Tokens of the whole answer, those of earlier attempts included."""
        return self.reserve.answered + len(self.token_ids)

    @property
    def may_be_adopted(self) -> bool:
        return self.state is not KeptState.PENDING

    def on(self, event: KeptEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)


class Kept:
    """All of one worker. Times are in ms of any one monotonic clock.

    kept_ms: an answer whose router is gone is kept for so long.
    kept_max: whole answers; the one that ended first makes room.
    """

    def __init__(self, *, kept_ms: int, kept_max: int) -> None:
        self.crowded_out = 0
        self._kept_ms = kept_ms
        self._kept_max = kept_max
        self._by_key: dict[Key, KeptAnswer] = {}
        self._by_holder: dict[Key, KeptAnswer] = {}
        self._by_name: dict[Name, list[KeptAnswer]] = {}  # the newest last
        self._whole: dict[Key, KeptAnswer] = {}  # in the order of their ends

    def __len__(self) -> int:
        return len(self._by_key)

    # ---- what happens to attempts

    def reserved(self, key: Key, reserve: worker_pb2.Reserve) -> None:
        answer = KeptAnswer(key, key, reserve)
        self._by_key[key] = self._by_holder[key] = answer
        self._by_name.setdefault(answer.name, []).append(answer)

    def begun(self, key: Key, token_ids: list[int]) -> None:
        """token_ids: the list that the answer's tokens will be added to."""
        answer = self._by_key[key]
        answer.on(KeptEvent.BEGIN)
        answer.token_ids = token_ids

    def ended(self, key: Key, ending: Ending) -> None:
        answer = self._by_key[key]
        answer.on(KeptEvent.END)
        answer.ending = ending
        self._whole[key] = answer
        while len(self._whole) > self._kept_max:
            self.let_go(next(iter(self._whole)))
            self.crowded_out += 1

    def let_go(self, key: Key) -> None:
        """Nobody shall adopt it; nothing changes for one that is not kept."""
        if answer := self._by_key.get(key):
            self._end(answer, KeptEvent.LET_GO)

    def session_ended(self, session: object, now_ms: float, router: str = "") -> None:
        """From now on others have kept_ms to adopt what this router had."""
        for answer in [a for a in self._by_key.values() if a.holder and a.holder[0] is session]:
            if not answer.may_be_adopted:
                self._end(answer, KeptEvent.ROUTER_LOST)
                continue
            answer.on(KeptEvent.ROUTER_LOST)
            answer.ends_ms, answer.router = now_ms + self._kept_ms, router
            self._held_by(answer, None)

    def expired(self, now_ms: float) -> list[Key]:
        """Ends the waits for a router whose time is up. Returns the attempts that still run."""
        over = [answer for answer in self._by_key.values() if answer.ends_ms <= now_ms]
        running = [answer.key for answer in over if answer.state is KeptState.ORPHANED]
        for answer in over:
            self._end(answer, KeptEvent.TIMEOUT)
        return running

    def orphans(self, router: str | None = None) -> list[Key]:
        """Attempts that run without a router, of all routers or of one; who lost its router first
        comes first."""
        alone = [a for a in self._by_key.values() if a.state is KeptState.ORPHANED]
        alone.sort(key=lambda answer: answer.ends_ms)
        return [answer.key for answer in alone if router is None or answer.router == router]

    # ---- what routers say and are told

    def holder(self, key: Key) -> Key | None:
        """What the router of this attempt calls it: its session and number; None without one."""
        answer = self._by_key.get(key)
        return key if answer is None else answer.holder

    def key_of(self, holder: Key) -> Key | None:
        """The attempt that a router calls so; None when it is not its own, or not any more."""
        answer = self._by_holder.get(holder)
        return None if answer is None else answer.key

    def may_be_adopted(self, key: Key) -> bool:
        answer = self._by_key.get(key)
        return answer is not None and answer.may_be_adopted

    def adopt(self, name: Name, holder: Key) -> tuple[KeptAnswer, Key | None] | None:
        """The attempt of this request that has come farthest, the newest of several, from now on
        the holder's; and whose it was until now, to be told, if that router may still be there.
        None: there is none."""
        found = [a for a in self._by_name.get(name, ()) if a.may_be_adopted]
        if not found:
            return None
        answer = max(reversed(found), key=lambda a: a.known)
        before = answer.holder
        answer.on(KeptEvent.ADOPT)
        answer.ends_ms = inf
        self._held_by(answer, holder)
        return answer, before

    def acknowledge(self, session: object, numbers: Iterable[int]) -> None:
        """These whole answers are where they should be; what is not whole, or not the session's,
        stays as it is."""
        for number in numbers:
            answer = self._by_holder.get((session, number))
            if answer is not None and answer.state is KeptState.WHOLE:
                self._end(answer, KeptEvent.ACKNOWLEDGE)

    def check(self) -> None:
        """Asserts that all that is remembered agrees. For tests."""
        answers = list(self._by_key.values())
        assert all(self._by_key[a.key] is a and a.state is not KeptState.GONE for a in answers)
        assert self._by_holder == {a.holder: a for a in answers if a.holder is not None}
        assert sum(map(len, self._by_name.values())) == len(answers)
        assert all(self._by_name.values())
        whole = (KeptState.WHOLE, KeptState.LEFT)
        assert set(self._whole) == {a.key for a in answers if a.state in whole}
        assert len(self._whole) <= self._kept_max
        alone = (KeptState.ORPHANED, KeptState.LEFT)
        for answer in answers:
            assert (answer.holder is None) == (answer.state in alone), answer
            assert (answer.ends_ms < inf) == (answer.state in alone), answer

    def _held_by(self, answer: KeptAnswer, holder: Key | None) -> None:
        if answer.holder is not None:
            del self._by_holder[answer.holder]
        answer.holder = holder
        if holder is not None:
            self._by_holder[holder] = answer

    def _end(self, answer: KeptAnswer, event: KeptEvent) -> None:
        answer.on(event)
        self._held_by(answer, None)
        self._whole.pop(answer.key, None)
        del self._by_key[answer.key]
        namesakes = self._by_name[answer.name]
        namesakes.remove(answer)
        if not namesakes:
            del self._by_name[answer.name]
