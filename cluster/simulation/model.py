"""The simulated model: the next token is a pure function of all tokens before, seed and position.

What a transformer keeps of a prefix in its KV cache is here one number, the prefix's state. The
state of a position follows from the state before it and the token, so whoever reads a wrong block
goes on with a wrong state and samples wrong tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MASK = (1 << 64) - 1
_ODD_1, _ODD_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
EMPTY = 0x243F6A8885A308D3  # the state before the first token
VOCAB = 61
EOS = 0


def after(state: int, token: int) -> int:
    """The state once `token` has come."""
    mixed = ((state ^ (token + 1)) * _ODD_1) & _MASK
    return mixed ^ (mixed >> 29)


def sample(state: int, seed: int, position: int, answered: int, *, may_end: bool) -> int:
    """The token at `position`. seed 0: greedy; answered: tokens of the answer so far, where the
    request's penalties count them, else 0."""
    mixed = ((state ^ seed) * _ODD_2 + position * _ODD_1 + answered) & _MASK
    token = ((mixed ^ (mixed >> 31)) * _ODD_1 & _MASK) >> 40
    token %= VOCAB
    return token if may_end or token != EOS else 1


@dataclass(frozen=True)
class Ask:
    """What a client asks for. seed 0: greedy."""

    request_id: str
    prompt: tuple[int, ...]
    seed: int
    max_tokens: int
    ignore_eos: bool = False
    penalties: bool = False
    min_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    ttft_deadline_ms: int = 0


def answer_to(ask: Ask) -> list[int]:
    """The whole answer that any worker must give: the reference."""
    state = state_of(ask.prompt)
    answer: list[int] = []
    while len(answer) < ask.max_tokens:
        may_end = len(answer) >= ask.min_tokens or ask.ignore_eos
        answered = len(answer) if ask.penalties else 0
        position = len(ask.prompt) + len(answer)
        token = sample(state, ask.seed, position, answered, may_end=may_end)
        answer.append(token)
        if token == EOS and not ask.ignore_eos:
            break
        state = after(state, token)
    return answer


def state_of(tokens: Sequence[int]) -> int:
    state = EMPTY
    for token in tokens:
        state = after(state, token)
    return state
