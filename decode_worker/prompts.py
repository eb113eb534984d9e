"""Prompts that a decode worker computes itself, in chunks beside the tokens of its running batch.

A pure object; decode_worker/service.py runs the chunks it names. While sequences run, a step has as
many prompt tokens as its predicted time allows, and at least a block, so that prompts always
advance; while none runs, a whole chunk. Where answers have a target for their mean time per token,
prompts wait for as many steps as it takes until all can afford a block (decode_worker/slack.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from decode_worker.reservation import Key
from decode_worker.slack import ENDLESS, Room
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step_cost import StepFit
from kvrelay.engine.turns import Chunk, Turns, nothing_new

_WAITS_MAX = 64  # steps in a row without a chunk, while prompts are here


class PromptsFullError(Exception):
    """`local_prompts_max` prompts are here already."""


@dataclass(eq=False)
class LocalPrompt:
    """A PromptJob of kvrelay/engine/turns.py."""

    key: Key
    prompt: Sequence[int]
    sampling: SamplingParams
    blocks: list[int]
    cached_tokens: int
    computed: int  # those that are cached included
    history: TokenHistory | None = None  # where sampling needs one
    started_s: float = 0.0  # when its first chunk began, by the service's clock


class LocalPrompts:
    """All of one worker. itl_target_ms 0: no bound but chunk_tokens; look_again: that of Turns."""

    def __init__(
        self,
        block_size: int,
        *,
        chunk_tokens: int,
        itl_target_ms: int,
        prompts_max: int,
        look_again: Callable[[LocalPrompt], int] = nothing_new,
    ) -> None:
        self._block_size = block_size
        self.chunk_tokens = max(chunk_tokens, block_size)  # of one step, at most
        self._itl_target_ms = itl_target_ms
        self._prompts_max = prompts_max
        self._turns: Turns[LocalPrompt] = Turns(block_size, look_again)
        self._prompts: dict[Key, LocalPrompt] = {}
        self._waits = 0  # steps in a row

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to be computed here."""
        return self._turns.tokens

    @property
    def queued_prompts(self) -> int:
        """That queued_tokens are of."""
        return len(self._turns)

    def check_room(self) -> None:
        """Raises PromptsFullError when no prompt can be added now."""
        if len(self._prompts) >= self._prompts_max:
            raise PromptsFullError(f"{self._prompts_max} prompts are to be computed here already")

    def add(self, prompt: LocalPrompt) -> None:
        self.check_room()
        self._prompts[prompt.key] = prompt
        self._turns.join(prompt)

    def leave(self, key: Key) -> None:
        prompt = self._prompts.pop(key, None)
        if prompt is not None:
            self._turns.leave(prompt)

    def next_chunks(
        self, running: int, fit: StepFit, room: Room = ENDLESS
    ) -> list[Chunk[LocalPrompt]]:
        """Oldest first, in turns, for a step that also gives `running` sequences a token."""
        if not self._prompts:
            return []
        tokens = self._tokens(running, fit, room)
        self._waits = 0 if tokens else self._waits + 1
        return self._turns.next_chunks(tokens)

    def computed(self, chunk: Chunk[LocalPrompt]) -> bool:
        """A step with this chunk has ended. False when its prompt left meanwhile."""
        prompt = chunk.job
        if self._prompts.get(prompt.key) is not prompt:
            return False
        self._turns.computed(chunk)
        if chunk.is_last:
            del self._prompts[prompt.key]
        else:
            self._turns.join(prompt)
        return True

    def _tokens(self, running: int, fit: StepFit, room: Room) -> int:
        affords = fit.cost.predict_ms(self._block_size, running) <= room.left_ms
        if running and not affords and self._waits < _WAITS_MAX:
            return 0
        bound_ms = min(room.left_ms, room.most_ms)
        if running and self._itl_target_ms:
            bound_ms = min(bound_ms, self._itl_target_ms)
        if bound_ms == inf:
            return self.chunk_tokens
        if room is not ENDLESS and not fit.cost.ms_per_prompt_token:
            return self._block_size  # nobody knows what more would cost
        within = fit.prompt_tokens_within(bound_ms, running)
        return max(self._block_size, min(within, self.chunk_tokens))
