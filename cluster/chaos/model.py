"""The model that `kvrelay chaos` serves when none is named: a few thousand random weights of the
Llama shape, with a tokenizer and a chat template; made once, and kept in the cache.

Its answers mean nothing, and are as definite as those of any other model.
"""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.model_store import PreparedModel
from cluster.preparation import ModelError, Progress, quiet
from kvrelay.cache import CacheError, build_once, default_cache

TINY = "tiny"
_FORMAT = 1  # raise it when what is made changes
_SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|user|>' if message.role == 'user' else"
    " '<|assistant|>' }}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # logits wide apart: an answer does not hang on rounding
    "tie_word_embeddings": False,
}
_SEED = 20


def tiny_model(on_progress: Progress) -> PreparedModel:
    """Raises ModelError when the cache cannot be written."""
    target = default_cache() / "models" / f"{TINY}-chaos-v{_FORMAT}"

    def build(folder: Path) -> None:
        on_progress("making a tiny model", None)
        _write_tokenizer(folder)
        _write_weights(folder)

    try:
        return PreparedModel(TINY, build_once(target, build, lambda: None))
    except CacheError as error:
        raise ModelError(str(error)) from error


def _write_tokenizer(folder: Path) -> None:
    """The 256 bytes, and words of two letters: answers that read as text, with stop strings and
    characters of several bytes in them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in string.ascii_lowercase for b in "aeiouy"]
    words = {word: at for at, word in enumerate([*_SPECIAL, *alphabet, *pairs])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_weights(folder: Path) -> None:
    with quiet("transformers"):
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        config = LlamaConfig(vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, **_SHAPE)
        config.dtype = torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
