"""Owns the right answer: transformers' own greedy `generate`, on the same weights, in fp32.

End-to-end tests compare token ids with it. The margins tell a bug from a rounding tie: where the
best and the second token are closer than MARGIN_MIN, two right programs may differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

# fp32 rounding moves logits by about 1e-5 (tiny models) to 2e-4 (SmolLM2, 2000 tokens).
MARGIN_MIN = 1e-3
_BATCH = 8
_PADDING_MAX = 48


@dataclass(frozen=True)
class Reference:
    """Token ids with EOS, if it came, and at each of them how far the second best logit was."""

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]

    @property
    def margin_min(self) -> float:
        return min(self.margins)


_Key = tuple[Path, tuple[int, ...], int]  # model folder, prompt, max_tokens

# Kept for the session: the models of tests are never changed.
_known: dict[_Key, Reference] = {}


def load(folder: Path) -> Any:
    """The model as transformers runs it when nobody has touched its attention."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def greedy(
    folder: Path, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
) -> list[Reference]:
    """The answers to `prompts`, at most max_tokens[i] tokens for the i-th.

    Prompts of like length go through the model together, padded on the left.
    """
    asked = [(folder, tuple(p), n) for p, n in zip(prompts, max_tokens, strict=True)]
    missing = sorted({key for key in asked if key not in _known}, key=lambda key: len(key[1]))
    if missing:
        model = load(folder)
        for keys in _batches(missing):
            answers = _generate(model, [key[1] for key in keys], [key[2] for key in keys])
            _known.update(zip(keys, answers, strict=True))
    return [_known[key] for key in asked]


def _batches(keys: Sequence[_Key]) -> Iterator[list[_Key]]:
    """Runs of `keys`, which ascend in the length of their prompts, that need little padding."""
    batch: list[_Key] = []
    for key in keys:
        if batch and (len(batch) == _BATCH or len(key[1]) > len(batch[0][1]) + _PADDING_MAX):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


@torch.inference_mode()
def _generate(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
) -> list[Reference]:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    eos = model.generation_config.eos_token_id
    output = model.generate(
        input_ids=torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=max(max_tokens),
        do_sample=False,
        pad_token_id=eos,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(output.logits, dim=1).topk(2).values  # [B, steps, 2]
    margins = (best_two[..., 0] - best_two[..., 1]).tolist()
    answers = []
    for row, limit in enumerate(max_tokens):
        tokens = output.sequences[row, longest:].tolist()[:limit]
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        answers.append(Reference(tuple(tokens[:length]), tuple(margins[row][:length])))
    return answers
