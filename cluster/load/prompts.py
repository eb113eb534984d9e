"""Prompts of a workload: equal prefix ids give equal tokens, all others differ.

Used by the targets. Tokens are drawn from numbers, so that any process makes the same ones.
"""

import re
from array import array
from dataclasses import dataclass

import numpy as np

from cluster.bench.text import TEXT, read_text
from cluster.workload.asks import Ask

_SPECIAL_IDS = 100  # vocabularies begin with tokens that mean something; small ones with fewer
_WORD = re.compile(r"[a-z]{2,7}")


@dataclass(frozen=True)
class Prompts:
    """`ids_end` is the first id that is not to be used."""

    seed: int
    block_tokens: int
    ids_end: int

    def tokens(self, ask: Ask, number: int) -> "array[int]":
        """[ask.prompt_tokens] of the workload's so-many-th request."""
        parts, left = [], ask.prompt_tokens
        for block in ask.prefix:
            parts.append(self._draw(0, block, self.block_tokens)[:left])
            left -= len(parts[-1])
        parts.append(self._draw(1, number, left))
        return array("I", np.concatenate(parts).astype(np.uint32).tobytes())

    def _draw(self, space: int, key: int, count: int) -> np.ndarray:
        """[count] ids, always the same for one key of one space. A key may be negative."""
        first = min(_SPECIAL_IDS, self.ids_end // 4)
        dice = np.random.default_rng([self.seed, space, int(key < 0), abs(key)])
        return dice.integers(first, self.ids_end, count, dtype=np.uint32)


def words() -> list[str]:
    """Common words, most of which are one token of common vocabularies with a space before them:
    prompts for servers that take no ids."""
    return sorted(set(_WORD.findall(read_text(TEXT))))
