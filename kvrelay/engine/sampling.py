"""Chooses the next token from logits. Both workers call it: P for the first token, D for the rest.

The noise is counter-based: a function of (seed, position in the sequence, choice index) and of
nothing else, so whoever continues a stream draws the tokens its predecessor would have drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvrelay.wire import worker_pb2

NOT_A_NUMBER = "the model's output is not a number; is the dtype too narrow for this request?"


@dataclass(frozen=True)
class SamplingParams:
    """What decides a request's tokens. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    eos_token_ids: frozenset[int]

    @classmethod
    def from_wire(cls, message: worker_pb2.Sampling) -> "SamplingParams":
        return cls(
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p,
            seed=message.seed,
            max_tokens=message.max_tokens,
            eos_token_ids=frozenset(message.eos_token_ids),
        )


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int | None]:
    """One token for each row of `logits` `[N, vocab]`; positions are those of the new tokens.

    None for a row with NaN in it: that request has failed, and the others have not.
    """
    # numpy: torch would wake a thread pool of its own, which then keeps cores from the engine's.
    scores = logits.to("cpu", torch.float32).numpy()
    best = scores.argmax(axis=-1)  # a row with NaN in it gives the place of one
    tokens: list[int | None] = best.tolist()
    failed = np.isnan(scores[np.arange(len(best)), best])
    for row, (p, position) in enumerate(zip(params, positions, strict=True)):
        if failed[row]:
            tokens[row] = None
        elif p.temperature > 0:
            tokens[row] = _draw(scores[row], p, position)
    return tokens


def _draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: all but the best go to exp(-inf)
        weights = np.exp((scores - scores.max()) / params.temperature)
    if params.top_k:
        weights = _keep_top_k(weights, params.top_k)
    if params.top_p < 1:
        weights = _keep_top_p(weights, params.top_p)
    # The inverse of the cumulative distribution in vocabulary order: unlike sorted order, a
    # rounding difference between two near-equal logits moves a boundary and reorders nothing.
    bounds = np.cumsum(weights)
    token = np.searchsorted(bounds, uniform(params.seed, position) * bounds[-1], side="right")
    return int(min(token, np.flatnonzero(weights)[-1]))


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """A number in [0, 1) that depends on these three and nothing else (Philox, 4 x 64 bits)."""
    counter = np.array([position, choice, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=seed, counter=counter)).random())


def _keep_top_k(weights: np.ndarray, k: int) -> np.ndarray:
    if k >= len(weights):
        return weights
    least = np.partition(weights, -k)[-k]
    return np.where(weights >= least, weights, 0.0)


def _keep_top_p(weights: np.ndarray, p: float) -> np.ndarray:
    """Keeps the likeliest tokens up to and with the one that reaches the share `p`."""
    descending = np.sort(weights)[::-1]
    shares = np.cumsum(descending) / descending.sum()
    least = descending[min(int(np.searchsorted(shares, p)), len(shares) - 1)]
    return np.where(weights >= least, weights, 0.0)
