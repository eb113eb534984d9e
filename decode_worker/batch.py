"""The running batch of a decode worker: who is in it, what each step computes, who is done.

A pure object; decode_worker/service.py runs the steps it names. Sequences join and leave at every
step. More than `batch_max` wait their turn in order of arrival.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from decode_worker.reservation import Key
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step import Slice


class Ending(Enum):
    NONE = 0
    EOS = 1
    LENGTH = 2


@dataclass(eq=False)
class Running:
    """A sequence whose prompt KV is here; `answer` starts with the token that ended its prefill."""

    key: Key
    prompt_tokens: int
    sampling: SamplingParams
    blocks: list[int]
    answer: list[int] = field(default_factory=list)
    history: TokenHistory | None = None  # where sampling needs one
    begun_ms: float = 0.0  # it joined the batch, by the service's clock

    @property
    def next_position(self) -> int:
        """Position in the sequence of the token that the next step samples."""
        return self.prompt_tokens + len(self.answer)

    def slice(self) -> Slice:
        """The newest token, whose KV is not in the pool yet."""
        return Slice(self.answer[-1:], self.next_position - 1, self.blocks)


class Output(NamedTuple):
    """One new token of one sequence."""

    key: Key
    offset: int
    token: int
    ending: Ending


class Batch:
    def __init__(self, batch_max: int) -> None:
        self._batch_max = batch_max
        self._sequences: dict[Key, Running] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def join(self, sequence: Running, first_token: int) -> Output:
        """Takes a sequence in, unless its first token is also its last."""
        output = self._append(sequence, first_token)
        if output.ending is Ending.NONE:
            self._sequences[sequence.key] = sequence
        return output

    def leave(self, key: Key) -> None:
        self._sequences.pop(key, None)

    def next_step(self) -> list[Running]:
        """The sequences of the next step, at most batch_max."""
        return list(self._sequences.values())[: self._batch_max]

    def apply(self, step: Sequence[Running], tokens: Sequence[int]) -> list[Output]:
        """Adds the step's tokens; sequences that left while it ran get none."""
        outputs = []
        for sequence, token in zip(step, tokens, strict=True):
            if sequence.key not in self._sequences:
                continue
            output = self._append(sequence, token)
            if output.ending is not Ending.NONE:
                self.leave(sequence.key)
            elif len(self._sequences) > self._batch_max:  # its turn is over: to the back
                self._sequences[sequence.key] = self._sequences.pop(sequence.key)
            outputs.append(output)
        return outputs

    def _append(self, sequence: Running, token: int) -> Output:
        offset = len(sequence.answer)
        sequence.answer.append(token)
        if sequence.history is not None:
            sequence.history.add(token)
        if token in sequence.sampling.eos_token_ids:
            ending = Ending.EOS
        elif len(sequence.answer) >= sequence.sampling.max_tokens:
            ending = Ending.LENGTH
        else:
            ending = Ending.NONE
        return Output(sequence.key, offset, token, ending)
