"""What came of one request. Written by the load generator and the simulator, read by figures.py.

All times are in seconds since the workload's beginning.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.workload.asks import Ask


def _no_gaps() -> Sequence[float]:
    return array("d")


@dataclass(slots=True)
class Outcome:
    """`error` says in a word or two why the request failed; "" where it did not.

    `gaps_s` has the times between messages with tokens, each shared out over its message's tokens.
    What only some servers tell, of themselves, is None elsewhere.
    """

    ask: Ask
    sent_s: float  # when it was really sent: beyond ask.at_s the load generator was slow
    first_token_s: float | None = None
    last_token_s: float | None = None
    tokens: int = 0
    gaps_s: Sequence[float] = field(default_factory=_no_gaps)
    cached_tokens: int = 0  # of the prompt
    error: str = ""
    queue_ms: float | None = None
    prefill_ms: float | None = None
    hand_off_ms: float | None = None  # as far as the client waited for it

    @property
    def ttft_ms(self) -> float | None:
        """From the time it was due, so that a slow client shows."""
        if self.first_token_s is None:
            return None
        return (self.first_token_s - self.ask.at_s) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """The mean gap after the first token; None where there is no second."""
        if self.first_token_s is None or self.last_token_s is None or self.tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) * 1000 / (self.tokens - 1)

    @property
    def ended(self) -> bool:
        """It has its answer."""
        return not self.error and self.last_token_s is not None
