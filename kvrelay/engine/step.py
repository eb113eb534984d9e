"""What one step of the engine is asked to compute. Schedule and batch name it, the engine runs it.

Light to import: the deciding parts of both workers need neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
