"""A stand-in for ModelRunner that computes nothing: for tests of what is around the engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from kvrelay.engine.step import Slice
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool


class FakeRunner:
    """Finds every token equally likely. Notes what it was asked for."""

    description = "nothing computed"
    context_limit: int | None = None
    weight_bytes = 1000

    def __init__(self, path: Path, **loaded_with: Any) -> None:
        config = AutoConfig.from_pretrained(path)
        self.loaded_with = loaded_with
        self.vocab = config.vocab_size
        self.layout = KVLayout(
            model_fingerprint="fake",
            dtype="float32",
            layers=config.num_hidden_layers,
            block_size=loaded_with["block_size"],
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        )
        self.pool: KVPool | None = None
        self.slices: list[Slice] = []
        self.closed = False

    @classmethod
    def load(cls, path: Path, **how: Any) -> "FakeRunner":
        return cls(path, **how)

    def attach(self, pool: KVPool) -> None:
        self.pool = pool

    def step(self, slices: Sequence[Slice], wanted: Sequence[bool]) -> torch.Tensor:
        self._check(slices)
        return torch.zeros(sum(wanted), self.vocab)

    def logits(self, slices: Sequence[Slice]) -> torch.Tensor:
        self._check(slices)
        return torch.zeros(sum(len(s.tokens) for s in slices), self.vocab)

    def _check(self, slices: Sequence[Slice]) -> None:
        assert self.pool is not None
        assert not self.closed
        used = [block for s in slices for block in s.blocks]
        assert len(used) == len(set(used)), "two sequences share a block"
        for s in slices:
            assert self.layout.blocks_for(s.end) <= len(s.blocks)
            assert all(0 <= block < self.pool.blocks for block in s.blocks)
            assert all(0 <= token < self.vocab for token in s.tokens)
        self.slices.extend(slices)

    def close(self) -> None:
        self.closed = True
