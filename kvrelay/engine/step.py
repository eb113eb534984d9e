"""What the engine's callers name: a step's slices, the flag that ends it, and how it can fail.

Light to import: the deciding parts of both workers need neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slice:
    """Tokens of one sequence that go through the model in one step.

    tokens are the positions start .. start + len(tokens); blocks hold the whole sequence, first
    position first, and have room for these tokens.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class StepCancelledError(Exception):
    """Nobody wants this step any more; it ended between two layers."""


class UnsupportedModelError(Exception):
    """The model cannot be served over a paged KV pool; the message says why in one line."""


class CancelFlag:
    """Set by one thread, looked at by compiled code between two layers."""

    def __init__(self) -> None:
        self._flag = np.zeros(1, np.int64)

    def set(self) -> None:
        self._flag[0] = 1

    def is_set(self) -> bool:
        return bool(self._flag[0])

    @property
    def address(self) -> int:
        return int(self._flag.ctypes.data)
