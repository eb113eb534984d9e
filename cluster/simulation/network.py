"""The simulated network: streams between processes that delay, stall and break, but never reorder.

A stream is what a gRPC call or a connected socket is to its two ends: messages in order, an end,
or a break that either side sees at its own time, after which what was on the way is lost. Messages
of different streams overtake each other as their delays fall. A cut between two processes holds
everything back until it heals, or until either end takes the silence for a break.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from cluster.simulation.loop import Life, ProcessLoop, Timeline

SAME_HOST = "shm"  # the kind of streams that end with a process alone
BY_GRPC = ("session", "client")


class StreamEndedError(ConnectionError):
    """The other side has closed the stream; everything that it sent has come."""


class StreamBrokenError(ConnectionError):
    """The stream broke: what was on the way is lost."""


@dataclass(frozen=True)
class Delays:
    """Seconds. Some messages take `slow_s` instead; a break is noticed within `break_s`, silence of
    a cut or a stopped process after `keepalive_s`."""

    least_s: float = 0.0002
    most_s: float = 0.002
    slow_share: float = 0.02
    slow_s: float = 0.05
    break_s: float = 0.02
    keepalive_s: float = 5.0


class Place:
    """A process as the network sees it: where its streams end."""

    def __init__(self, name: str, loop: ProcessLoop) -> None:
        self.name = name
        self.loop = loop
        self.ends: dict[End, None] = {}
        self.accepts: dict[str, Callable[[End], None]] = {}  # by address

    @property
    def alive(self) -> bool:
        return self.loop.life is not Life.DEAD


@dataclass(eq=False)
class End:
    """One side of a stream. `on_break` is called in its process when the stream breaks."""

    network: "Network"
    place: Place
    kind: str
    on_break: Callable[[], object] | None = None
    peer: "End" = field(init=False)
    _arrived: deque[Any] = field(default_factory=deque)
    _reader: "asyncio.Future[None] | None" = None
    _over: ConnectionError | None = None  # said to the reader once all that came is read
    _closed: bool = False  # by this side
    _last_s: float = 0.0  # arrival of the last message that this side has sent

    @property
    def closed(self) -> bool:
        return self._closed or self._over is not None

    def send(self, message: Any) -> None:
        """Raises StreamBrokenError or StreamEndedError when the stream is known to be over."""
        if self._closed:
            raise StreamEndedError("the stream is closed")
        if isinstance(self._over, StreamBrokenError):
            raise self._over
        self.network.carry(self, message)

    async def receive(self) -> Any:
        """The next message. Raises StreamEndedError or StreamBrokenError."""
        while not self._arrived:
            if self._closed:
                raise StreamEndedError("the stream is closed")
            if self._over is not None:
                raise self._over
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._arrived.popleft()

    def end_sending(self) -> None:
        """The peer sees the end after what was sent; what it sends still comes."""
        if not self.closed:
            self.network.carry(self, _END)

    def close(self) -> None:
        """The peer sees the end after what was sent. Safe at any time."""
        if not self._closed:
            self._closed = True
            self._wake()
            if not isinstance(self._over, StreamBrokenError):
                self.network.carry(self, _END)
            self._leave_if_done()

    # ---- in the process of this end, at the time of the event

    def arrive(self, message: Any) -> None:
        if self._over is not None:
            return
        if message is _END:
            self._over = StreamEndedError("the peer closed the stream")
            self._leave_if_done()
        elif self._closed:
            return
        else:
            self.network.arrived(self, message)
            self._arrived.append(message)
        self._wake()

    def broken(self) -> None:
        if self._over is None:
            self._over = StreamBrokenError(f"the stream with {self.peer.place.name} broke")
            self._arrived.clear()
            self.place.ends.pop(self, None)
            self._wake()
            if self.on_break is not None and not self._closed:
                self.on_break()

    def _leave_if_done(self) -> None:
        if self._closed and self._over is not None:
            self.place.ends.pop(self, None)

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)


_END = ("end",)
_APART_S = 1e-6  # two messages of one stream


class Network:
    """heard: told of every message as it arrives: kind of stream, sender, receiver, message."""

    def __init__(
        self,
        timeline: Timeline,
        rng: Random,
        delays: Delays,
        heard: Callable[[End, Any], None],
    ) -> None:
        self.places: dict[str, Place] = {}
        self.delays = delays
        self.arrived = heard
        self._timeline = timeline
        self._rng = rng
        self._where: dict[str, Place] = {}  # by address
        self._cuts: dict[frozenset[str], list[tuple[End, Any]]] = {}  # and what they hold back

    # ---- for processes

    def listen(self, place: Place, address: str, accept: Callable[[End], None]) -> None:
        place.accepts[address] = accept
        self._where[address] = place

    async def dial(self, place: Place, address: str, kind: str) -> End:
        """A stream to whoever listens there. Raises ConnectionRefusedError when nobody does."""
        await asyncio.sleep(self._delay_s())
        other = self._where.get(address)
        if other is None or not other.alive:
            raise ConnectionRefusedError(f"nothing answers at {address}")
        mine, theirs = End(self, place, kind), End(self, other, kind)
        mine.peer, theirs.peer = theirs, mine
        place.ends[mine] = other.ends[theirs] = None
        self.carry(mine, _Accept(address))
        return mine

    def carry(self, end: End, message: Any) -> None:
        """Takes a message from one end to the other."""
        if not end.place.alive:
            return
        cut = self._cuts.get(frozenset((end.place.name, end.peer.place.name)))
        if cut is not None and end.kind != SAME_HOST:
            cut.append((end, message))
        else:
            self._deliver(end, message)

    def _deliver(self, end: End, message: Any) -> None:
        # Later than the one before: what happens at one time has no order.
        when_s = max(end._last_s + _APART_S, self._timeline.now_s + self._delay_s())
        end._last_s = when_s
        peer = end.peer
        if isinstance(message, _Accept):
            peer.place.loop.post(when_s, self._accepted, peer, message.address)
        else:
            peer.place.loop.post(when_s, peer.arrive, message)

    def _accepted(self, end: End, address: str) -> None:
        accept = end.place.accepts.get(address)
        if accept is None:
            self.break_stream(end)
        else:
            accept(end)

    def _delay_s(self) -> float:
        delays = self.delays
        if self._rng.random() < delays.slow_share:
            return self._rng.uniform(delays.most_s, delays.slow_s)
        return self._rng.uniform(delays.least_s, delays.most_s)

    # ---- for faults

    def break_stream(self, end: End) -> None:
        """Both ends see it, each at its own time; what is on the way until then still comes."""
        for side in (end, end.peer):
            self._break_side(side, self._rng.uniform(0, self.delays.break_s))

    def _break_side(self, side: End, within_s: float) -> None:
        if side.place.alive:
            side.place.loop.post(self._timeline.now_s + within_s, side.broken)

    def gone(self, place: Place) -> None:
        """Its process is dead: whoever is connected hears of it."""
        for end in list(place.ends):
            self._break_side(end.peer, self._rng.uniform(0, self.delays.break_s))
        place.ends.clear()
        for address in place.accepts:
            if self._where.get(address) is place:
                del self._where[address]

    def stopped(self, place: Place) -> None:
        """It answers no ping: whoever is connected by gRPC takes it for gone in the end. Sockets of
        its host are kept up by the host."""
        self._timeline.call_later(self.delays.keepalive_s, lambda: self._give_up(place))

    def _give_up(self, place: Place) -> None:
        if place.loop.life is Life.STOPPED:
            for end in list(place.ends):
                if end.kind in BY_GRPC:
                    self.break_stream(end)

    @property
    def is_cut(self) -> bool:
        """Between any two."""
        return bool(self._cuts)

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between these processes until `heal`; new streams hang."""
        pair = frozenset((one, other))
        if pair not in self._cuts:
            held = self._cuts[pair] = []
            self._timeline.call_later(self.delays.keepalive_s, lambda: self._tear(pair, held))

    def heal(self, one: str, other: str) -> None:
        for end, message in self._cuts.pop(frozenset((one, other)), ()):
            self.carry(end, message)

    def _tear(self, pair: frozenset[str], held: list[tuple[End, Any]]) -> None:
        if self._cuts.get(pair) is not held:
            return  # it has healed
        held.clear()
        for name in sorted(pair):
            place = self.places.get(name)
            for end in list(place.ends) if place is not None else ():
                if end.peer.place.name in pair and end.kind != SAME_HOST:
                    self._break_side(end, self._rng.uniform(0, self.delays.break_s))


@dataclass(frozen=True)
class _Accept:
    address: str
