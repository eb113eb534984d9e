"""Synthetic workloads, each request drawn from a seed.

The lengths are our choice of what such requests are like on servers of large models; `scaled` of
traces.py makes them fit a small one. The same seed draws the same requests whatever their rate.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from cluster.workload.arrivals import Arrivals, arrival_times
from cluster.workload.asks import Ask, Workload, WorkloadError

Range = tuple[int, int]  # tokens, both ends included

BLOCK_TOKENS = 64
UNIFORM_PROMPT: Range = (64, 512)
UNIFORM_ANSWER: Range = (16, 64)
SEED_DEFAULT = 0
_REQUESTS_MAX = 10_000_000  # of one workload

_GOES_ON_SHARE = 0.6  # of chat requests: another turn of a conversation
_CONVERSATIONS_MAX = 64  # that may go on: the newest ones
_CHAT_PROMPT_MAX = 8192  # a conversation that is longer does not go on

_SYSTEM_PROMPTS = 8  # of `shared-prefix`; the n-th is asked 1/n as often as the first
_SYSTEM_BLOCKS = 32

_Draw = Callable[[float], Ask]  # an Ask of that time


@dataclass(frozen=True)
class _Length:
    """Log-normal: `median` tokens, and one in ten is longer than `p90`."""

    median: int
    p90: int
    most: int

    def draw(self, dice: random.Random) -> int:
        sigma = math.log(self.p90 / self.median) / 1.2816  # the normal distribution's own p90
        tokens = round(dice.lognormvariate(math.log(self.median), sigma))
        return min(max(1, tokens), self.most)


_CHAT_TURN, _CHAT_ANSWER = _Length(120, 700, 4096), _Length(250, 600, 2048)
_QUESTION, _SHORT_ANSWER = _Length(60, 250, 1024), _Length(120, 350, 1024)
_PLAIN: dict[str, tuple[_Length, _Length]] = {  # prompt and answer of requests that share nothing
    # Much as those of the Azure trace of code completion.
    "code": (_Length(1500, 5200, 7500), _Length(13, 55, 2048)),
    # As ShareGPT's on the mean in DistServe's figures, 755 and 200 tokens, in OPT's context.
    "sharegpt": (_Length(620, 1650, 1800), _Length(142, 425, 900)),
    "summarise": (_Length(3000, 9000, 32_000), _Length(150, 350, 1024)),
    "reasoning": (_Length(180, 700, 4096), _Length(2500, 9000, 24_000)),
}
_MIXED = {"chat": 50, "code": 25, "summarise": 15, "reasoning": 10}  # shares of `mixed`

MIXES = ("chat", "code", "sharegpt", "summarise", "reasoning", "shared-prefix", "mixed", "uniform")


def make_mix(
    name: str,
    rate: float,
    seconds: float | None,
    seed: int = SEED_DEFAULT,
    arrivals: Arrivals = "poisson",
    *,
    requests: int | None = None,
    prompt: Range = UNIFORM_PROMPT,
    answer: Range = UNIFORM_ANSWER,
) -> Workload:
    """`rate` requests a second for so long, or so many, whichever ends first.

    `prompt` and `answer` are for the mix `uniform`. Raises WorkloadError.
    """
    _check(name, rate, seconds, arrivals, requests)
    dice = random.Random(f"{seed} what")
    draw = _Uniform(dice, prompt, answer).draw if name == "uniform" else _drawer(name, dice)
    times = arrival_times(arrivals, rate, random.Random(f"{seed} when"))
    if seconds is not None:
        times = itertools.takewhile(lambda at_s: at_s < seconds, times)
    most = _REQUESTS_MAX if requests is None else requests
    asks = tuple(draw(at_s) for at_s in itertools.islice(times, most))
    if not asks:
        raise WorkloadError(
            f"{rate:g} requests a second for {seconds:g} s are none: ask for more of either"
        )
    return Workload(name, asks, BLOCK_TOKENS)


def _check(
    name: str, rate: float, seconds: float | None, arrivals: str, requests: int | None
) -> None:
    if name not in MIXES:
        raise WorkloadError(f"there is no mix {name!r}: take one of {', '.join(MIXES)}")
    if arrivals not in get_args(Arrivals):
        known = ", ".join(get_args(Arrivals))
        raise WorkloadError(f"there are no arrivals {arrivals!r}: take one of {known}")
    if not (math.isfinite(rate) and rate > 0):
        raise WorkloadError(f"the rate is {rate:g} requests a second: it must be above 0")
    if seconds is None and requests is None:
        raise WorkloadError("a mix has no end of its own: say how many seconds or requests")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise WorkloadError(f"the workload takes {seconds:g} s: it must be more than 0")
    if requests is not None and not 1 <= requests <= _REQUESTS_MAX:
        raise WorkloadError(f"{requests} requests: it must be 1 to {_REQUESTS_MAX:,}")
    if requests is None and seconds is not None and rate * seconds > _REQUESTS_MAX:
        raise WorkloadError(
            f"{rate:g} requests a second for {seconds:g} s are more than {_REQUESTS_MAX:,}: "
            "ask for less of either"
        )


def _drawer(name: str, dice: random.Random) -> _Draw:
    match name:
        case "chat":
            return _Chats(dice).draw
        case "shared-prefix":
            return _SharedPrefixes(dice).draw
        case "mixed":
            return _Mixed(dice).draw
    return lambda at_s: _plain(name, at_s, dice)


def _plain(name: str, at_s: float, dice: random.Random) -> Ask:
    prompt, answer = (length.draw(dice) for length in _PLAIN[name])
    return Ask(at_s, prompt, answer, kind=name)


@dataclass(frozen=True)
class _Uniform:
    dice: random.Random
    prompt: Range
    answer: Range

    def __post_init__(self) -> None:
        for what, (least, most) in (("prompt", self.prompt), ("answer", self.answer)):
            if not 1 <= least <= most:
                raise WorkloadError(
                    f"{what}s of {least} to {most} tokens: the first must be at least 1, "
                    "and not above the second"
                )

    def draw(self, at_s: float) -> Ask:
        prompt, answer = self.dice.randint(*self.prompt), self.dice.randint(*self.answer)
        return Ask(at_s, prompt, answer, kind="uniform")


class _Chats:
    """Conversations: a turn's prompt is all that was said before it, and a new question."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._open: list[tuple[int, int]] = []  # first id of its blocks, tokens said
        self._next_id = 0

    def draw(self, at_s: float) -> Ask:
        if self._open and self._dice.random() < _GOES_ON_SHARE:
            first_id, said = self._open.pop(self._dice.randrange(len(self._open)))
        else:
            first_id, said = self._next_id, 0
            self._next_id += _blocks(_CHAT_PROMPT_MAX + _CHAT_TURN.most)
        prompt = said + _CHAT_TURN.draw(self._dice)
        answer = _CHAT_ANSWER.draw(self._dice)
        if prompt + answer <= _CHAT_PROMPT_MAX:
            self._open.append((first_id, prompt + answer))
            del self._open[:-_CONVERSATIONS_MAX]
        prefix = tuple(range(first_id, first_id + _blocks(prompt)))
        return Ask(at_s, prompt, answer, prefix, kind="chat")


class _SharedPrefixes:
    """A few long system prompts, some far more common than others, and a question behind each."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._weights = [1 / (number + 1) for number in range(_SYSTEM_PROMPTS)]

    def draw(self, at_s: float) -> Ask:
        (number,) = self._dice.choices(range(_SYSTEM_PROMPTS), self._weights)
        first_id = number * _SYSTEM_BLOCKS
        prompt = _SYSTEM_BLOCKS * BLOCK_TOKENS + _QUESTION.draw(self._dice)
        prefix = tuple(range(first_id, first_id + _SYSTEM_BLOCKS))
        return Ask(at_s, prompt, _SHORT_ANSWER.draw(self._dice), prefix, kind="shared-prefix")


class _Mixed:
    """Requests of several mixes. Only chats share prefixes, so that their ids are their own."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._draws = {name: _drawer(name, dice) for name in _MIXED}

    def draw(self, at_s: float) -> Ask:
        (name,) = self._dice.choices(tuple(_MIXED), tuple(_MIXED.values()))
        return self._draws[name](at_s)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
