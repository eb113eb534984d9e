"""Chooses the next token from logits. Both workers call it: P for the first token, D for the rest.

The noise is counter-based: a function of (seed, position in the sequence, choice index) and of
nothing else, so whoever continues a stream draws the tokens its predecessor would have drawn.
Penalties count the tokens of the whole sequence, whoever sampled them, to the same end.

In order: penalties and min_tokens on the logits; temperature, min_p, top_k and top_p on the
probabilities. As in vLLM, so that its users find what they know.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams

NOT_A_NUMBER = "the model's output is not a number; is the dtype too narrow for this request?"
_FAR = float(np.finfo(np.float32).max)


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[TokenHistory | None] = (),
) -> list[int | None]:
    """One token for each row of `logits` `[N, vocab]`; positions are those of the new tokens.

    histories: what `history_of` gave each row's sequence, kept up to date; or none for all.

    None for a row with NaN in it: that request has failed, and the others have not.
    """
    # numpy: torch would wake a thread pool of its own, which then keeps cores from the engine's.
    scores = logits.to("cpu", torch.float32).numpy()
    best = scores.argmax(axis=-1)  # a row with NaN in it gives the place of one
    tokens: list[int | None] = best.tolist()
    failed = np.isnan(scores[np.arange(len(best)), best])
    asked = zip(params, positions, histories or [None] * len(params), strict=True)
    for row, (p, position, history) in enumerate(asked):
        if failed[row]:
            tokens[row] = None
        elif history is not None:
            own = _adjusted(scores[row], p, history)
            tokens[row] = _draw(own, p, position) if p.temperature > 0 else int(own.argmax())
        elif p.temperature > 0:
            tokens[row] = _draw(scores[row], p, position)
    return tokens


def _adjusted(logits: np.ndarray, params: SamplingParams, history: TokenHistory) -> np.ndarray:
    """`logits` `[vocab]` with penalties, and without what must not end the answer yet."""
    too_short = history.sampled < params.min_tokens
    if not params.penalises and not too_short:
        return logits
    scores = logits.astype(np.float64)
    if params.penalises:
        ids = history.ids
        scores[ids] = _penalised(scores[ids], params, history.counts)
    if too_short:
        ends = np.fromiter(params.eos_token_ids, np.int64)
        scores[ends[ends < len(scores)]] = -np.inf  # some models name end tokens they lack
    return scores


def _penalised(scores: np.ndarray, params: SamplingParams, counts: np.ndarray) -> np.ndarray:
    """`scores` `[tokens]` of tokens that the sequence has, in its answer `counts` times."""
    strength = params.repetition_penalty
    with np.errstate(over="ignore"):  # of the largest penalties and the least
        scores = np.where(scores > 0, scores / strength, scores * strength)
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return np.clip(scores, -_FAR, _FAR)  # infinities would leave nothing to compare


def _draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: all but the best go to exp(-inf)
        weights = np.exp((scores - scores.max()) / params.temperature)
    if params.min_p:  # the likeliest token's weight is 1
        weights = np.where(weights >= params.min_p, weights, 0.0)
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
