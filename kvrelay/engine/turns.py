"""Prompts that are computed in chunks, in turns: a short one behind a long one waits for a chunk,
not for the prompt.

A pure object. Both workers have one: the prefill worker's Schedule, and the decode worker's
LocalPrompts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvrelay.engine.step import Slice


class PromptJob(Protocol):
    """A prompt whose first `computed` tokens have their KV in `blocks`; of these, the first
    cached_tokens were there before it."""

    prompt: Sequence[int]
    blocks: list[int]
    computed: int
    cached_tokens: int


J = TypeVar("J", bound=PromptJob)


@dataclass(frozen=True)
class Chunk(Generic[J]):
    """Prompt tokens start .. start + count of one job, computed in one step."""

    job: J
    start: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.start == self.job.cached_tokens

    @property
    def is_last(self) -> bool:
        return self.start + self.count == len(self.job.prompt)

    def slice(self) -> Slice:
        tokens = self.job.prompt[self.start : self.start + self.count]
        return Slice(tokens, self.start, self.job.blocks)


class Turns(Generic[J]):
    """Jobs with room for their KV, the next to be served first."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._jobs: deque[J] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: J) -> bool:
        return job in self._jobs

    @property
    def tokens(self) -> int:
        """Still to be computed."""
        return sum(len(job.prompt) - job.computed for job in self._jobs)

    def join(self, job: J) -> None:
        self._jobs.append(job)

    def leave(self, job: J) -> None:
        self._jobs.remove(job)

    def next_chunks(self, tokens: int) -> list[Chunk[J]]:
        """Chunks of up to `tokens` in all, at least a block. Only the last chunk of a job ends
        within a block: whole ones can be shared and handed on."""
        chunks = []
        for job in self._jobs:
            count = min(len(job.prompt) - job.computed, tokens)
            if job.computed + count < len(job.prompt):
                count -= count % self._block_size
            if count <= 0:
                break
            chunks.append(Chunk(job, job.computed, count))
            tokens -= count
        return chunks

    def computed(self, chunk: Chunk[J]) -> None:
        """A step with this chunk has ended: its job leaves, and may join again at the back."""
        chunk.job.computed += chunk.count
        self._jobs.remove(chunk.job)
