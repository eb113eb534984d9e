"""How a request's tokens are to be chosen, as messages say it; sampling.py chooses.

Light to import: the deciding parts of both workers need no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.engine.history import TokenHistory
from kvrelay.wire import worker_pb2


@dataclass(frozen=True)
class SamplingParams:
    """What decides a request's tokens. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    max_tokens and min_tokens are of this attempt's answer, eos_token_ids all that end it.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    eos_token_ids: frozenset[int]
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0

    @property
    def penalises(self) -> bool:
        """The tokens that there are decide on the next one by more than the model."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @classmethod
    def from_wire(cls, message: worker_pb2.Sampling) -> "SamplingParams":
        return cls(
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p,
            seed=message.seed,
            max_tokens=message.max_tokens,
            eos_token_ids=frozenset(message.eos_token_ids),
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty or 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            min_tokens=message.min_tokens,
        )


def history_of(
    params: SamplingParams, prompt: Sequence[int], prompt_tokens: int, answered: int
) -> TokenHistory | None:
    """What `sample` has to know of a sequence before its first token here; None: nothing.

    prompt: needed, with all its prompt_tokens, only where `params` penalise.
    answered: so many of its last tokens are an answer's that an earlier attempt began.

    Raises:
        ValueError: the prompt is not there, or is shorter than what was answered.
    """
    if not params.penalises:
        return TokenHistory() if params.min_tokens else None
    if len(prompt) != prompt_tokens:
        raise ValueError(f"penalties need all {prompt_tokens} prompt tokens, got {len(prompt)}")
    if answered > prompt_tokens:
        raise ValueError(f"{answered} tokens answered, of {prompt_tokens} prompt tokens")
    if params.repetition_penalty == 1:  # the others look at the answer alone
        prompt = prompt[prompt_tokens - answered :]
    return TokenHistory(prompt, answered)
