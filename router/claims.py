"""What the attempts under way ask of their pairs, in the sums that their workers are ranked by.

Pure, kept for router/workers.py. A claim's workers may be gone: then nobody reads their sums.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

from router.worker import DecodeWorker, PrefillWorker, Worker


@dataclass
class Claim:
    """What one attempt asks of its pair."""

    computes: Worker  # the prompt
    decode: DecodeWorker
    prompt_tokens: int  # that are to be computed
    blocks: int
    moved_blocks: int = 0  # by the hand-off


class Claims:
    """rank: called with each worker whose sums have changed."""

    def __init__(self, rank: Callable[[Worker], None]) -> None:
        self._rank = rank
        self._by_key: dict[int, Claim] = {}  # by the attempt's key

    @property
    def keys(self) -> Set[int]:
        return self._by_key.keys()

    def begin(self, key: int, claim: Claim) -> None:
        self._by_key[key] = claim
        claim.computes.asked_tokens += claim.prompt_tokens
        claim.computes.asked_prompts += 1
        claim.computes.measured.prompts.note()
        claim.decode.measured.answers.note()
        claim.decode.asked_blocks += claim.blocks
        claim.decode.asked += 1
        claim.decode.coming += 1
        self._rank(claim.computes)
        self._rank(claim.decode)

    def reserved(self, key: int, cached_blocks: int) -> None:
        """From now on the decode worker's own figure knows of the blocks."""
        claim = self._by_key[key]
        claim.moved_blocks -= cached_blocks
        self._give_blocks_back(claim)

    def computed(self, key: int) -> None:
        """The prompt is no backlog any more."""
        self._give_prompt_back(self._by_key[key])

    def handed_off(self, key: int, exposed_ms: float) -> None:
        """Notes what the hand-off cost."""
        claim = self._by_key[key]
        worker = claim.computes
        if isinstance(worker, PrefillWorker):
            worker.refused = False  # the prompt's blocks are free there
            worker.hand_offs.note(claim.moved_blocks, exposed_ms)
            self._rank(worker)

    def release(self, key: int) -> None:
        claim = self._by_key.pop(key)
        claim.decode.asked -= 1
        self._give_prompt_back(claim)
        self._give_blocks_back(claim)

    def _give_blocks_back(self, claim: Claim) -> None:
        claim.decode.asked_blocks -= claim.blocks
        claim.blocks = 0
        self._rank(claim.decode)

    def _give_prompt_back(self, claim: Claim) -> None:
        if claim.prompt_tokens:
            claim.computes.asked_prompts -= 1
            claim.computes.asked_tokens -= claim.prompt_tokens
            claim.decode.coming -= 1
            claim.prompt_tokens = 0
            self._rank(claim.computes)
            if claim.decode is not claim.computes:
                self._rank(claim.decode)
