"""One answer as its client saw it come: when, with which silences, and how it ended.

load.py keeps one for each request, outcome.py makes figures of them. Times are those of
time.monotonic, which all processes of a host share, in seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

SILENCE_S = 0.2  # shorter ones are remembered only as the longest of their stream

Outcome = Literal["answered", "cancelled", "lost", "wrong", "repeated"]
Window = tuple[float, float]  # from, to


@dataclass
class Stream:
    """`trouble` says what went wrong, if something did."""

    number: int  # of the request, counted from the first that was asked
    ask: int  # which of the asks
    asked_s: float
    first_s: float | None = None
    ended_s: float = 0.0
    tokens: int = 0
    silences: list[Window] = field(default_factory=list)
    outcome: Outcome = "lost"  # until it is known better
    trouble: str = "it has not ended"
    asked_again: int = 0  # whole, for its router was lost
    resumed: int = 0  # where it was, for its router was lost
    refused: int = 0  # for now, with a hint when to come back
    _last_s: float | None = None
    _longest: Window | None = None

    def came(self, now_s: float, tokens: int) -> float | None:
        """Tokens came. The seconds since those before them, if there were any."""
        gap_s = None if self.first_s is None else now_s - self._since_s
        self._end_silence(now_s)
        if self.first_s is None:
            self.first_s = now_s
        self.tokens += tokens
        return gap_s

    def end(self, now_s: float) -> None:
        self._end_silence(now_s)
        self.ended_s = now_s
        if not self.silences and self._longest is not None:
            self.silences.append(self._longest)

    @property
    def _since_s(self) -> float:
        return self.asked_s if self._last_s is None else self._last_s

    def _end_silence(self, now_s: float) -> None:
        silence = (self._since_s, now_s)
        self._last_s = now_s
        if _length(silence) >= SILENCE_S:
            self.silences.append(silence)
        elif self._longest is None or _length(silence) > _length(self._longest):
            self._longest = silence


def stall_s(stream: Stream) -> float:
    """The longest time in which the client got nothing: from its asking to the first token,
    between two tokens, or from the last one to the end."""
    return max(map(_length, stream.silences), default=0.0)


def stall_beyond_s(stream: Stream, windows: Sequence[Window]) -> float:
    """As `stall_s`, without what lies in `windows`."""
    return max((_outside(silence, windows) for silence in stream.silences), default=0.0)


def is_struck(stream: Stream, windows: Iterable[Window]) -> bool:
    """It ran in one of these."""
    return any(stream.asked_s <= to and since <= stream.ended_s for since, to in windows)


def _outside(silence: Window, windows: Sequence[Window]) -> float:
    """Seconds of `silence` that are in none of the windows, which are in order and apart."""
    begin, end = silence
    inside = sum(max(0.0, min(end, to) - max(begin, since)) for since, to in windows)
    return end - begin - inside


def _length(window: Window) -> float:
    return window[1] - window[0]
