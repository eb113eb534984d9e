"""What penalties and min_tokens know of one sequence: its distinct tokens, counted as they come.

Made where a sequence begins on a worker (see `history_of`), told each token that is sampled, read
by `sample`. A token costs a look-up, not a walk over what came before it.
"""

from collections.abc import Sequence

import numpy as np


class TokenHistory:
    """prompt: the tokens that came before this worker sampled any; the last `answered` of them
    are an answer's that an earlier attempt began."""

    def __init__(self, prompt: Sequence[int] = (), answered: int = 0) -> None:
        begun = len(prompt) - answered
        assert 0 <= begun <= len(prompt), (len(prompt), answered)
        self.sampled = 0  # tokens of this attempt
        ids, places = np.unique(np.asarray(prompt, np.int64), return_inverse=True)
        self._size = len(ids)
        self._ids = ids
        self._counts = np.bincount(places[begun:], minlength=len(ids))
        self._place = dict(zip(ids.tolist(), range(len(ids)), strict=True))

    def add(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self.sampled += 1
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            self._append(token)
        self._counts[place] += 1

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):  # doubles, so that growing costs little a token
            room = np.zeros(self._size + 16, np.int64)
            self._ids = np.concatenate([self._ids, room])
            self._counts = np.concatenate([self._counts, room])
        self._ids[self._size] = token
        self._size += 1

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens, in no order that means anything."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often the answer, that of earlier attempts included, has each of `ids`."""
        return self._counts[: self._size]
