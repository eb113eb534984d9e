"""What one worker's device takes for its work: a DeviceProfile, kept as a JSON file.

`kvrelay profile` measures one and `kvrelay simulate` computes with it; for hardware that nobody
here has it is entered by hand, and then says from what. Pure: loads neither torch nor a model.
"""

from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FILE_BYTES_MAX = 1 << 20
KNOTS_MAX = 64
SLOWED_MAX = 100.0  # times

Ms = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Phase = Literal["prefill", "decode"]


class ProfileError(ValueError):
    """The file cannot be read or used; one line that says why."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Measured(_Frozen):
    """On a machine, by `kvrelay profile`. Errors are those of the fitted step times, in share of
    each time that was measured."""

    how: Literal["measured"] = "measured"
    machine: Text
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str = ""
    command: Text
    median_error: Ms
    p90_error: Ms

    def __str__(self) -> str:
        return f"measured on {self.machine}"


class ByHand(_Frozen):
    """Worked out from `text`: a data sheet, a paper, somebody's benchmark."""

    how: Literal["by hand"] = "by hand"
    text: Text

    def __str__(self) -> str:
        return f"entered by hand from {self.text}"


def attended(chunk_tokens: int, start: int) -> int:
    """Positions that the tokens of a chunk look at, all together: each at those before it and at
    itself. `start`: where in its prompt the chunk begins."""
    return chunk_tokens * start + chunk_tokens * (chunk_tokens + 1) // 2


class StepTime(_Frozen):
    """The time of one step of an engine, in ms: a sum, every part of which is linear or, by
    `ms_by_tokens`, in pieces.

    ms_by_tokens: pairs of (tokens of the step, ms), by tokens: what its layers take for all of its
    tokens, of prompts and of sequences alike; linear between two pairs and beyond the last one, and
    below the first as the first. Empty: nothing.
    """

    base_ms: Ms = 0.0
    ms_per_prompt_token: Ms = 0.0
    ms_per_attended: Ms = 0.0  # of prompts: see `attended`
    ms_per_sequence: Ms = 0.0  # that decodes
    ms_per_context_token: Ms = 0.0  # of the sequences that decode, all together
    ms_by_tokens: tuple[tuple[Count, Ms], ...] = Field(default=(), max_length=KNOTS_MAX)

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens = [knot for knot, _ in self.ms_by_tokens]
        times = [ms for _, ms in self.ms_by_tokens]
        if any(later <= knot for knot, later in pairwise(tokens)):
            raise ValueError("ms_by_tokens: its tokens must grow from pair to pair")
        if any(later < ms for ms, later in pairwise(times)):
            raise ValueError("ms_by_tokens: more tokens may not take less time")
        if not self.ms(1, 1, 0, 0) or not self.ms(0, 0, 1, 1):
            raise ValueError("a step may not take no time at all")
        return self

    def ms(
        self, prompt_tokens: int, prompt_attended: int, sequences: int, context_tokens: int
    ) -> float:
        """Of one step.

        Args:
            prompt_tokens: in all its chunks.
            prompt_attended: the sum of `attended` of its chunks.
            sequences: that get their next token.
            context_tokens: the sum of how long each of these is.
        """
        return (
            self.base_ms
            + self.ms_per_prompt_token * prompt_tokens
            + self.ms_per_attended * prompt_attended
            + self.ms_per_sequence * sequences
            + self.ms_per_context_token * context_tokens
            + (self._layers_ms(prompt_tokens + sequences) if self.ms_by_tokens else 0.0)
        )

    def decode_ms(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Of as many steps in a row of the same sequences and no prompt, each sequence longer by
        one in every step. context_tokens: of the first step."""
        more = sequences * (steps * (steps - 1) // 2)
        first_ms = self.ms(0, 0, sequences, context_tokens)
        return steps * first_ms + self.ms_per_context_token * more

    def _layers_ms(self, tokens: int) -> float:
        knots = self.ms_by_tokens
        if tokens <= knots[0][0] or len(knots) == 1:
            return knots[0][1]
        upper = min(bisect_left(knots, (tokens, 0.0)), len(knots) - 1)
        (low, low_ms), (high, high_ms) = knots[upper - 1 : upper + 1]
        return low_ms + (tokens - low) * (high_ms - low_ms) / (high - low)


class HandOffTime(_Frozen):
    """KV of one prompt on its way from a prefill worker to a decode worker. Blocks go while the
    next chunk is computed, so a request waits for the blocks of its last chunk and `fixed_ms`."""

    link: str = Field(min_length=1, max_length=64)  # shm, tcp, ...
    fixed_ms: Ms
    ms_per_block: Ms

    def ms(self, blocks: int) -> float:
        return self.fixed_ms + self.ms_per_block * blocks


class BusyNeighbour(_Frozen):
    """How many times as long a step takes while another worker of the same host computes: they
    share memory, and perhaps more. By what the step does."""

    prefill: float = Field(default=1.0, ge=1.0, le=SLOWED_MAX)
    decode: float = Field(default=1.0, ge=1.0, le=SLOWED_MAX)


class DeviceProfile(_Frozen):
    """One kind of device with one model on it, as a prefill or a decode worker has it."""

    name: Text
    source: Measured | ByHand = Field(discriminator="how")
    step: StepTime
    hand_offs: tuple[HandOffTime, ...] = Field(min_length=1)  # the first is the one used
    router_ms: Ms  # what the router adds to a first token
    block_tokens: Count
    block_bytes: Count
    kv_blocks: Count  # of one worker's pool
    batch_max: Count  # sequences in one step
    chunk_tokens: Count  # of prompts in one step
    workers_per_host: Count = 1
    busy_neighbour: BusyNeighbour = Field(default_factory=BusyNeighbour)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ProfileError."""
        try:
            with path.open("rb") as file:
                text = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise ProfileError(f"{path}: {error.strerror}") from error
        if len(text) > FILE_BYTES_MAX:
            raise ProfileError(f"{path}: larger than {FILE_BYTES_MAX} bytes: no device profile")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ProfileError(f"{path}: {_first(error)}") from None

    def write(self, path: Path) -> None:
        """Raises ProfileError."""
        try:
            path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"{path}: {error.strerror}") from error

    def hand_off(self, link: str | None = None) -> HandOffTime:
        """By that link; the first without one.

        Raises:
            ProfileError: there is none.
        """
        for one in self.hand_offs:
            if link in (None, one.link):
                return one
        known = ", ".join(one.link for one in self.hand_offs)
        raise ProfileError(f"the profile {self.name} has no link {link}: choose one of {known}")


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    wrong = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in wrong["loc"])
    what = wrong["msg"].replace("\n", " ")
    return f"{where}: {what}" if where else what
