"""What a step costs on this machine, fitted to the steps that were measured.

A pure object. EngineHost measures and owns one; the decode worker sizes its chunks of prompts by
it, and both workers send it to routers, which predict with it.

The model is linear: step_ms = base_ms + ms_per_prompt_token * prompt tokens + ms_per_sequence *
sequences that decode. Attention is not: a token far into a long prompt costs more than one at its
beginning. The fit is the cost at about the contexts of late; who must keep to a time now asks
`prompt_tokens_within`, which also goes by how far off the very last steps were.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median, median_low

_KEPT = 16  # steps of each kind
_HALF_LIFE_STEPS = 512  # a kind of steps that was not seen for as many counts half
_WEIGHT_MIN = 1e-3  # but it is not forgotten: nobody else may know what prompts cost
_SAMPLES_MIN = 3  # steps of a kind before it counts: the first ones are often held up
# Decides where the steps leave it open, and nothing else: base_ms gets the time, unless steps have
# more than about 16 prompt tokens, which then get it.
_RIDGE = (1e-9, 1e-9 * 16**2, 1e-9 * 256**2)  # of the weight of all steps
_REFIT_STEPS = 8  # a fit takes up to 0.5 ms, so not after every step
_PACED = 5  # steps with prompts that say how far off the fit is at present
_GROWTH = 2  # a step's prompt tokens, against the most that was ever measured


@dataclass(frozen=True)
class StepCost:
    """All 0: unknown."""

    base_ms: float = 0.0
    ms_per_prompt_token: float = 0.0
    ms_per_sequence: float = 0.0

    def predict_ms(self, prompt_tokens: float, sequences: float) -> float:
        prompts_ms = self.ms_per_prompt_token * prompt_tokens
        return self.base_ms + prompts_ms + self.ms_per_sequence * sequences


@dataclass
class _Kind:
    """Steps with about as many prompt tokens and about as many sequences."""

    steps: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    newest: int = 0  # number of the last

    @property
    def is_known(self) -> bool:
        return len(self.steps) >= _SAMPLES_MIN

    def middle(self, cost: StepCost) -> tuple[int, int, float]:
        """The step with the median time against `cost`: those of a kind differ a little in size."""
        by_ratio = [(ms / (cost.predict_ms(p, s) or p + s), p, s, ms) for p, s, ms in self.steps]
        return median_low(by_ratio)[1:]


class StepFit:
    """The cost that explains the measured steps best, in share of each, never below 0.

    Steps are kept by kind, the newest few of each, and the one in the middle speaks for its kind:
    so a step that the machine held up changes nothing, and what a long prompt costs is still known
    after thousands of steps without one.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self._kinds: dict[tuple[int, int], _Kind] = {}
        self._measured = 0
        self._prompt_tokens_most = 0
        self._paces: deque[float] = deque(maxlen=_PACED)  # time measured, in that predicted

    def measured(self, prompt_tokens: int, sequences: int, step_ms: float) -> None:
        """A step that ended: tokens of prompts, sequences that decoded, time."""
        if prompt_tokens + sequences == 0 or step_ms <= 0:
            return
        self._measured += 1
        self._prompt_tokens_most = max(self._prompt_tokens_most, prompt_tokens)
        name = (prompt_tokens.bit_length(), sequences.bit_length())
        kind = self._kinds.setdefault(name, _Kind())
        predicted_ms = self.cost.predict_ms(prompt_tokens, sequences)
        if prompt_tokens and predicted_ms and kind.is_known:
            self._paces.append(step_ms / predicted_ms)
        was_known = kind.is_known
        kind.steps.append((prompt_tokens, sequences, step_ms))
        kind.newest = self._measured
        if kind.is_known and (not was_known or self._measured % _REFIT_STEPS == 0):
            self.cost = self._fitted()

    def prompt_tokens_within(self, step_ms: float, sequences: int) -> int:
        """As many prompt tokens as a step with these sequences may have to be predicted to take at
        most step_ms, at the pace of the last steps with prompts where that is slower than the fit;
        at most twice as many as any step had that was measured."""
        known = _GROWTH * self._prompt_tokens_most
        pace = max(1.0, median(self._paces)) if self._paces else 1.0
        left_ms = step_ms / pace - self.cost.predict_ms(0, sequences)
        per_token_ms = self.cost.ms_per_prompt_token
        if left_ms <= 0:
            return 0
        if left_ms >= known * per_token_ms:
            return known
        return int(left_ms / per_token_ms)

    def _fitted(self) -> StepCost:
        """Least squares of the relative errors."""
        sums = [[0.0] * 3 for _ in range(3)]
        wanted = [0.0] * 3
        for kind in self._kinds.values():
            if not kind.is_known:
                continue
            prompt_tokens, sequences, ms = kind.middle(self.cost)
            age = (self._measured - kind.newest) / _HALF_LIFE_STEPS
            weight = len(kind.steps) * max(_WEIGHT_MIN, 0.5**age)
            row = (1 / ms, prompt_tokens / ms, sequences / ms)
            for i in range(3):
                wanted[i] += weight * row[i]
                for j in range(3):
                    sums[i][j] += weight * row[i] * row[j]
        everything = sums[0][0]
        for i in range(3):
            sums[i][i] += _RIDGE[i] * everything
        return StepCost(*_solved(sums, wanted))


def _solved(sums: Sequence[Sequence[float]], wanted: Sequence[float]) -> tuple[float, ...]:
    """Minimises x'Ax - 2b'x over x >= 0, for a positive definite A of 3 x 3: where some must be 0,
    the best of the few choices which."""
    best, least = (0.0, 0.0, 0.0), 0.0
    for size in (3, 2, 1):
        for free in combinations(range(3), size):
            x = _eliminated([[sums[i][j] for j in free] for i in free], [wanted[i] for i in free])
            if min(x) < 0:
                continue
            # At a minimum over the free ones, x'Ax = b'x.
            value = -sum(wanted[i] * x_i for i, x_i in zip(free, x, strict=True))
            if value < least:
                least = value
                full = dict(zip(free, x, strict=True))
                best = (full.get(0, 0.0), full.get(1, 0.0), full.get(2, 0.0))
        if least < 0:
            break
    return best


def _eliminated(a: list[list[float]], b: list[float]) -> list[float]:
    """Solves ax = b; a is positive definite, so no pivot is 0. Changes both."""
    n = len(b)
    for k in range(n):
        for row in range(k + 1, n):
            share = a[row][k] / a[k][k]
            b[row] -= share * b[k]
            for column in range(k, n):
                a[row][column] -= share * a[k][column]
    for k in range(n - 1, -1, -1):
        b[k] = (b[k] - sum(a[k][j] * b[j] for j in range(k + 1, n))) / a[k][k]
    return b
