"""The other side of the engine bench: transformers' own model, float32, doing the same work.

Made by engine.py; each method gives a piece of Work for `interleaved_medians`.
"""

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from cluster.bench.cases import GENERATED
from cluster.bench.timing import Work, timed
from kvrelay.kv.layout import KVLayout

_KV_SPREAD = 0.1


class TransformersSide:
    """`layout` is that of our own pool: it knows the shape of the KV."""

    def __init__(self, model: Any, layout: KVLayout) -> None:
        self._model = model
        self._layout = layout
        self._vocab = model.config.get_text_config().vocab_size
        # Nothing ends an answer before its length does.
        model.generation_config = GenerationConfig(pad_token_id=0)

    @property
    def description(self) -> str:
        attention = self._model.config._attn_implementation
        return f"transformers' modules, float32, {attention} attention"

    def prefill(self, tokens: int) -> Work:
        """The whole prompt in one call, with logits of its last token only: kinder than
        `generate`, which does more besides."""
        ids = self._random_ids(1, tokens)

        @torch.inference_mode()
        def work() -> float:
            return timed(lambda: self._model(input_ids=ids, use_cache=True, logits_to_keep=1))

        return work

    def decode(self, batch: int, context: int) -> Work:
        """Seconds of one step. One sequence: `generate`. Several: the modules alone, one call a
        step, which is kinder again: no bookkeeping for sequences that end or differ in length."""
        return self._generate(context) if batch == 1 else self._step(batch, context)

    def _generate(self, context: int) -> Work:
        """Greedy; the time of 1 + GENERATED tokens less that of 1, divided by GENERATED."""
        before = max(1, context - (GENERATED + 1) // 2)
        cache = self._cache(1, before)
        ids = self._random_ids(1, before + 1)

        def generate(tokens: int) -> float:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            taken = timed(
                lambda: self._model.generate(
                    **inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False
                )
            )
            assert cache.get_seq_length() == before + tokens, "an answer of another length"
            cache.crop(before - cache.get_seq_length())
            return taken

        @torch.inference_mode()
        def work() -> float:
            first = generate(1)
            return max(generate(1 + GENERATED) - first, 1e-9) / GENERATED

        return work

    def _step(self, batch: int, context: int) -> Work:
        """A call of the model with one token a sequence, up to the token chosen."""
        cache = self._cache(batch, context)
        ids = self._random_ids(batch, 1)
        positions = torch.full((batch, 1), context)

        def step() -> torch.Tensor:
            output = self._model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            )
            return output.logits[:, -1].argmax(-1)

        @torch.inference_mode()
        def work() -> float:
            taken = timed(step)
            cache.crop(-1)
            return taken

        return work

    def _cache(self, batch: int, context: int) -> DynamicCache:
        layout = self._layout
        shape = (batch, layout.kv_heads, context, layout.head_dim)
        values = torch.randn(shape) * _KV_SPREAD
        cache = DynamicCache()
        for layer in range(layout.layers):
            cache.update(values, values, layer)  # which copies them
        return cache

    def _random_ids(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(self._vocab, (batch, tokens))
