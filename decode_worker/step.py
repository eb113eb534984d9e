"""One step of a decode worker as the engine takes it: running sequences and chunks of prompts.

decode_worker/service.py makes it of what Batch and LocalPrompts name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from decode_worker.batch import Running
from decode_worker.prompts import LocalPrompt
from decode_worker.reservation import Key
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step import Slice
from kvrelay.engine.turns import Chunk


@dataclass(frozen=True)
class DecodeStep:
    """Every part is a slice, running sequences first. All but the chunks that do not end their
    prompt get a token."""

    running: Sequence[Running] = ()
    chunks: Sequence[Chunk[LocalPrompt]] = ()

    def __bool__(self) -> bool:
        return bool(self.running or self.chunks)

    @property
    def keys(self) -> list[Key]:
        return [s.key for s in self.running] + [chunk.job.key for chunk in self.chunks]

    def slices(self) -> list[Slice]:
        return [s.slice() for s in self.running] + [chunk.slice() for chunk in self.chunks]

    def params(self) -> list[SamplingParams | None]:
        """None: no token is wanted."""
        of_chunks = [chunk.job.sampling if chunk.is_last else None for chunk in self.chunks]
        return [*(s.sampling for s in self.running), *of_chunks]

    def positions(self) -> list[int]:
        of_chunks = [len(chunk.job.prompt) for chunk in self.chunks]
        return [*(s.next_position for s in self.running), *of_chunks]

    def histories(self) -> list[TokenHistory | None]:
        return [*(s.history for s in self.running), *(chunk.job.history for chunk in self.chunks)]

    def tokens_of_running(self, tokens: Sequence[int | None]) -> Sequence[int | None]:
        """One for each running sequence, of the engine's tokens for the step."""
        return tokens[: len(self.running)]

    def tokens_of_chunks(self, tokens: Sequence[int | None]) -> list[int | None]:
        """One for each chunk, None where none was wanted, of the engine's tokens for the step."""
        remaining = iter(tokens[len(self.running) :])
        return [next(remaining) if chunk.is_last else None for chunk in self.chunks]
