"""Conversions: owns what transformers makes of a GGUF file or of a slow tokenizer.

Called by model_store with a folder to fill, once for each model. transformers and torch are
imported inside the functions: a start that converts nothing shall not wait for them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.preparation import ModelError, Progress, quiet


def convert_gguf(file: Path, folder: Path, on_progress: Progress) -> None:
    """Fills `folder` with the model of `file` as fp32 safetensors and its tokenizer."""
    on_progress("reading the tokenizer", None)
    save_tokenizer(file.parent, folder, gguf_file=file.name)
    import torch
    from transformers import AutoModelForCausalLM

    on_progress("converting weights", None)
    with _quiet_transformers(lambda fraction: on_progress("converting weights", fraction)):
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        # transformers fills such gaps with random numbers and a warning.
        if gaps := sorted(info["missing_keys"]):
            raise ModelError(
                f"{file} lacks {len(gaps)} tensors ({gaps[0]}): give one whole file, not a part"
            )
        on_progress("writing the converted model", None)
        _forget_quantization(model)
        model.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """The weights are plain fp32 by now; transformers still has them down as GGUF."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.dtype = model.dtype


def save_tokenizer(source: Path, folder: Path, **how: str) -> None:
    """Writes the tokenizer in `source` to `folder`, as tokenizer.json where it has a fast form."""
    from transformers import AutoTokenizer

    with _quiet_transformers():
        AutoTokenizer.from_pretrained(source, **how).save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers(on_fraction: Callable[[float], None] | None = None) -> Iterator[None]:
    """No bars and no warnings of transformers' own; its GGUF bar goes to `on_fraction`."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as chatter

    def bar(items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, item in enumerate(items):
            yield item
            if on_fraction:
                on_fraction((done + 1) / len(items))

    bars_were_on, own_bar = chatter.is_progress_bar_enabled(), gguf.tqdm
    with quiet("transformers"):
        chatter.disable_progress_bar()
        gguf.tqdm = bar
        try:
            yield
        finally:
            gguf.tqdm = own_bar
            if bars_were_on:
                chatter.enable_progress_bar()
