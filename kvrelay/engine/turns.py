"""Prompts that are computed in chunks, in turns: a short one behind a long one waits for a chunk,
not for the prompt.

A pure object. Both workers have one: the prefill worker's Schedule, and the decode worker's
LocalPrompts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvrelay.engine.step import Slice


class PromptJob(Protocol):
    """A prompt whose first `computed` tokens have their KV in `blocks`; of these, others have
    computed cached_tokens."""

    prompt: Sequence[int]
    blocks: list[int]
    computed: int
    cached_tokens: int


J = TypeVar("J", bound=PromptJob)


@dataclass(slots=True)
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


def nothing_new(job: PromptJob) -> int:
    """Others compute nothing that this job needs."""
    return 0


class Turns(Generic[J]):
    """Jobs with room for their KV, the next to be served first.

    look_again is asked of a job whose chunk is about to be cut: it puts what others have computed
    of the prompt meanwhile, from `computed` on, into the job's blocks, and says how many tokens.
    """

    def __init__(self, block_size: int, look_again: Callable[[J], int] = nothing_new) -> None:
        self._block_size = block_size
        self._look_again = look_again
        self._jobs: deque[J] = deque()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def tokens(self) -> int:
        """Still to be computed."""
        return self._tokens

    def join(self, job: J) -> None:
        self._jobs.append(job)
        self._tokens += len(job.prompt) - job.computed

    def leave(self, job: J) -> None:
        self._jobs.remove(job)
        self._tokens -= len(job.prompt) - job.computed

    def next_chunks(self, tokens: int) -> list[Chunk[J]]:
        """Chunks of up to `tokens` in all, at least a block. Only the last chunk of a job ends
        within a block: whole ones can be shared and handed on."""
        chunks = []
        for job in self._jobs:
            if tokens <= 0:
                break
            self._catch_up(job)
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
        self.leave(chunk.job)
        chunk.job.computed += chunk.count

    def _catch_up(self, job: J) -> None:
        found = self._look_again(job)
        job.computed += found
        job.cached_tokens += found
        self._tokens -= found

    def check(self) -> None:
        """Raises AssertionError when the count is wrong. Called by tests."""
        assert self._tokens == sum(len(job.prompt) - job.computed for job in self._jobs)
