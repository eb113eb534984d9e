"""Which rows the engine bench has, and which of them a model and a machine have room for.

Pure: engine.py measures what this chooses.
"""

from dataclasses import dataclass
from typing import Literal

from kvrelay.kv.layout import KVLayout

PREFILL_TOKENS = (128, 1024, 4096)
DECODE_BATCHES = (1, 8, 16, 32)
DECODE_CONTEXTS = (16, 256, 1024)
# Tokens of a `generate` that are timed. Odd: the context of the one in the middle is the row's.
GENERATED = 15


@dataclass(frozen=True)
class Case:
    """One row: a prompt of `tokens`, or steps of `batch` sequences with `tokens` of context."""

    phase: Literal["prefill", "decode"]
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        if self.phase == "prefill":
            return f"prefill/{self.tokens}"
        return f"decode/b{self.batch}/c{self.tokens}"

    @property
    def positions(self) -> int:
        """The longest that one of its sequences becomes: `generate` ends beyond the context."""
        return self.tokens if self.phase == "prefill" else self.tokens + GENERATED // 2 + 1

    def kv_bytes(self, layout: KVLayout) -> int:
        return self.batch * layout.blocks_for(self.positions) * layout.block_bytes


def all_cases(*, quick: bool) -> list[Case]:
    prefill = PREFILL_TOKENS[:1] if quick else PREFILL_TOKENS
    batches = DECODE_BATCHES[:2] if quick else DECODE_BATCHES
    contexts = DECODE_CONTEXTS[:1] if quick else DECODE_CONTEXTS
    return [
        *(Case("prefill", 1, tokens) for tokens in prefill),
        *(Case("decode", batch, context) for batch in batches for context in contexts),
    ]


def measurable(
    cases: list[Case], layout: KVLayout, *, positions_max: int | None, kv_bytes_max: float
) -> tuple[list[Case], list[str]]:
    """The cases that the model and the memory have room for, and a sentence on each other one."""
    chosen, notes = [], []
    for case in cases:
        if positions_max is not None and case.positions > positions_max:
            notes.append(f"{case.name} left out: the model ends at {positions_max} tokens")
        elif case.kv_bytes(layout) > kv_bytes_max:
            need, free = (size / 2**30 for size in (case.kv_bytes(layout), kv_bytes_max))
            notes.append(f"{case.name} left out: {need:.1f} GiB of KV, and room for {free:.1f} GiB")
        else:
            chosen.append(case)
    return chosen, notes
