"""One answer as it comes: makes an Outcome of the times that its messages came at.

Used by the targets, which say when and how many tokens; no clock here.
"""

from array import array

from cluster.workload.asks import Ask
from cluster.workload.outcomes import Outcome


class Reading:
    """Times are in seconds since the workload's beginning."""

    def __init__(self, ask: Ask, sent_s: float) -> None:
        self._gaps_s = array("d")
        self.outcome = Outcome(ask, sent_s, gaps_s=self._gaps_s)

    def came(self, now_s: float, tokens: int) -> None:
        """A message with so many tokens. Its first tokens have no gap before them: that is TTFT."""
        outcome = self.outcome
        if outcome.first_token_s is None or outcome.last_token_s is None:
            outcome.first_token_s = now_s
        else:
            gap_s = (now_s - outcome.last_token_s) / tokens
            self._gaps_s.extend([gap_s] * tokens)
        outcome.last_token_s = now_s
        outcome.tokens += tokens

    def failed(self, kind: str) -> None:
        self.outcome.error = kind

    def ended(self, tokens: int | None = None, cached_tokens: int = 0) -> None:
        """The answer is whole. `tokens`: as the server counts them, where it does."""
        if tokens is not None and self.outcome.first_token_s is not None:
            self.outcome.tokens = tokens
        self.outcome.cached_tokens = cached_tokens
        if self.outcome.first_token_s is None:
            self.outcome.error = "answer without tokens"
