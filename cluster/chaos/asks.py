"""What the clients of `kvrelay chaos` ask for: a fixed set of requests, the same for the same seed.

Each has one right answer: what is sampled has a seed of its own. Called by load.py.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PREFIXES = 4  # beginnings that prompts share
_PREFIX_WORDS = 40
_WORDS = ("the", "rain", "in", "another", "town", "is", "wet", "and", "late", "on", "Monday")
_STOPS = ("ka", "the", "Zo ")


@dataclass(frozen=True)
class Mix:
    """How long prompts and answers are, in tokens; each length is as likely as the others."""

    prompts: Sequence[int]
    answers: Sequence[int]


MIXES: Mapping[str, Mix] = {
    "chaos": Mix(prompts=(10, 60, 200, 600), answers=(10, 80, 300, 1000)),
    "soak": Mix(prompts=(10, 60, 200), answers=(2, 8, 24)),
}


@dataclass(frozen=True)
class Ask:
    """`prompt` is a text or token ids; a text where `chat`, whose message it is."""

    number: int
    over: Literal["grpc", "http"]
    chat: bool
    prompt: str | tuple[int, ...]
    options: Mapping[str, Any]  # of kvrelay.request.SamplingOptions, by the same names in OpenAI's

    @property
    def kind(self) -> str:
        """For people: what is particular about it."""
        words = [self.over, "chat" if self.chat else "completion"]
        words.append("sampled" if self.options["temperature"] else "greedy")
        if "stop" in self.options:
            words.append("with stop strings")
        return " ".join(words)


def make_asks(
    count: int,
    seed: int,
    mix: Mix,
    *,
    vocab_size: int,
    tokens_max: int,
    chats: bool,
    http_share: float,
) -> list[Ask]:
    """`tokens_max` is for prompt and answer together; `chats`: the model has a chat template."""
    dice = random.Random(seed)
    prefixes = [_words(dice, _PREFIX_WORDS) for _ in range(PREFIXES)]
    prefix_ids = [_ids(dice, _PREFIX_WORDS, vocab_size) for _ in range(PREFIXES)]

    def ask(number: int) -> Ask:
        chat = chats and dice.random() < 0.4
        length = min(dice.choice(mix.prompts), tokens_max // 8)
        answer = min(dice.choice(mix.answers), tokens_max // 4)
        prompt: str | tuple[int, ...]
        if chat or dice.random() < 0.3:
            # A word may be several tokens: of the tiny model, one for each letter.
            prompt = dice.choice(prefixes) + _words(dice, max(1, length // 8))
        else:
            prompt = dice.choice(prefix_ids) + _ids(dice, length, vocab_size)
        return Ask(
            number=number,
            over="http" if dice.random() < http_share else "grpc",
            chat=chat,
            prompt=prompt,
            options={"max_tokens": answer, **_sampling(dice)},
        )

    return [ask(number) for number in range(count)]


def _sampling(dice: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {"temperature": 0.0, "seed": dice.randrange(1 << 32)}
    if dice.random() < 0.6:
        chosen |= {"temperature": 1.0, "top_p": dice.choice((0.9, 1.0))}
    elif dice.random() < 0.7:
        # A greedy answer of a small model soon goes round in circles, where a token that came
        # twice would not be seen.
        chosen["frequency_penalty"] = 1.0
    if dice.random() < 0.2:
        chosen["stop"] = list(_STOPS)
    if dice.random() < 0.5:
        chosen["ignore_eos"] = True
    return chosen


def _words(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices(_WORDS, k=count)) + " "


def _ids(dice: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(dice.randrange(vocab_size) for _ in range(count))
