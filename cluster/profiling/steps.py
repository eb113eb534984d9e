"""Which steps of an engine are measured, and what of a step its time depends on. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.capacity.device import attended
from kvrelay.kv.layout import KVLayout

_CHUNKS = (16, 32, 64, 128, 192)  # and the largest that a worker takes
_CHUNK_STARTS = (0, 256, 1024)
_TURNS = 4  # prompts that share a step
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (16, 256, 1024)
_MIXED_CHUNKS = (16, 64)  # and the largest
_MIXED_BATCHES = (1, 4, 16)
_MIXED_CONTEXT = 256


@dataclass(frozen=True)
class StepShape:
    """One step: chunks of prompts, each with where in its prompt it begins, beside `sequences`
    that get a token, each of `context` tokens so far."""

    chunks: tuple[tuple[int, int], ...] = ()
    sequences: int = 0
    context: int = 0

    @property
    def name(self) -> str:
        prompts = [f"{tokens}@{start}" for tokens, start in self.chunks]
        decoding = [f"b{self.sequences}@{self.context}"] if self.sequences else []
        return "step/" + "+".join([*prompts, *decoding])

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self.chunks)

    @property
    def work(self) -> tuple[int, int, int, int]:
        """As StepTime.ms takes it."""
        looked_at = sum(attended(tokens, start) for tokens, start in self.chunks)
        return self.prompt_tokens, looked_at, self.sequences, self.sequences * self.context

    @property
    def lengths(self) -> list[int]:
        """Of each sequence, once the step has ended."""
        prompts = [start + tokens for tokens, start in self.chunks]
        return prompts + [self.context + 1] * self.sequences

    def blocks(self, layout: KVLayout) -> int:
        return sum(map(layout.blocks_for, self.lengths))

    def to_json(self) -> list[Any]:
        return [[list(chunk) for chunk in self.chunks], self.sequences, self.context]

    @classmethod
    def from_json(cls, found: list[Any]) -> "StepShape":
        chunks, sequences, context = found
        return cls(tuple((tokens, start) for tokens, start in chunks), sequences, context)


def all_steps(chunk_tokens: int, batch_max: int, *, quick: bool) -> list[StepShape]:
    """Prompts alone, sequences alone, and both together, with up to as much as a worker takes."""
    sizes = sorted({*(n for n in _CHUNKS if n < chunk_tokens), chunk_tokens})
    batches = sorted({*(n for n in _BATCHES if n < batch_max), batch_max})
    starts: tuple[int, ...] = _CHUNK_STARTS
    contexts: tuple[int, ...] = _CONTEXTS
    if quick:
        sizes, batches = [sizes[0], sizes[-1]], batches[::3]
        starts, contexts = starts[:2], contexts[:2]
    each = max(1, chunk_tokens // _TURNS)
    mixed_sizes = sorted({*(n for n in _MIXED_CHUNKS if n in sizes), sizes[-1]})
    steps = [StepShape(((tokens, start),)) for tokens in sizes for start in starts]
    steps.append(StepShape(((each, 0),) * _TURNS))
    steps += [StepShape((), batch, context) for batch in batches for context in contexts]
    steps += [
        StepShape(((tokens, 0),), batch, _MIXED_CONTEXT)
        for tokens in mixed_sizes
        for batch in _MIXED_BATCHES
        if batch in batches
    ]
    return steps


def prompt_steps(chunk_tokens: int) -> list[StepShape]:
    """What a prefill worker does most of the time."""
    return [StepShape(((max(1, chunk_tokens // part), 0),)) for part in (4, 1)]


def decode_steps(batch_max: int) -> list[StepShape]:
    """What a decode worker does most of the time."""
    return [StepShape((), batch, _MIXED_CONTEXT) for batch in (1, 8, 16) if batch <= batch_max]


def measurable(
    steps: Iterable[StepShape], layout: KVLayout, blocks: int, positions_max: int | None
) -> Iterator[StepShape]:
    """Those that a pool of so many blocks and the model's longest sequence have room for."""
    for step in steps:
        fits = positions_max is None or max(step.lengths) <= positions_max
        if fits and step.blocks(layout) <= blocks:
            yield step
