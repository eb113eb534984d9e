"""Owns what the router knows of a model: tokenizer, limits, end tokens, chat template.

Read once when the router starts. The files are those of a Hugging Face model folder; they are read
here because transformers, which would do it, brings torch with it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from router.detokenize import byte_level_bytes

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
SPECIAL_TOKEN_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Pre-tokenizers, or a behaviour of one, that leave some of the text out.
DROPPING_PRE_TOKENIZERS = (
    "Removed",
    "Whitespace",
    "WhitespaceSplit",
    "BertPreTokenizer",
    "CharDelimiterSplit",
)
# Stands for "no limit": more bytes than any prompt may have.
UNBOUNDED_BYTES = 1 << 40


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """What the router knows of one model.

    `max_position_embeddings` is None where the model sets no limit. `eos_token_ids` may be empty:
    answers then end by length alone. No token stands for more than `longest_token_bytes` of text.
    """

    name: str
    vocab_size: int
    max_position_embeddings: int | None
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]  # by field name: "bos_token": "<s>"
    longest_token_bytes: int

    @classmethod
    def load(cls, path: Path | str, name: str) -> "ModelFiles":
        """Raises ValueError, in one line, for a folder that is not a whole model."""
        folder = Path(path)
        config = _read_json(folder / "config.json")
        tokenizer_config = _read_json(folder / "tokenizer_config.json", optional=True)
        tokenizer = _tokenizer(folder)
        special_tokens = _special_tokens(tokenizer_config)
        return cls(
            name=name,
            vocab_size=_vocab_size(config, folder),
            max_position_embeddings=_positions(config, folder),
            eos_token_ids=_eos_token_ids(folder, config, tokenizer, special_tokens),
            tokenizer=tokenizer,
            chat_template=_chat_template(folder, tokenizer_config),
            special_tokens=special_tokens,
            longest_token_bytes=_longest_token_bytes(tokenizer),
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    text = _read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a tokenizer: {reason}") from error
    # Some models come with these switched on; a prompt would be cut short without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _field(config: dict[str, Any], name: str) -> Any:
    """A field of the model's own, or of its language part where it has several."""
    value = config.get(name)
    nested = config.get("text_config")
    return nested.get(name) if value is None and isinstance(nested, dict) else value


def _vocab_size(config: dict[str, Any], folder: Path) -> int:
    size = _field(config, "vocab_size")
    if not _is_positive(size):
        raise ValueError(f"{folder / 'config.json'} has no vocab_size over 0, but {size!r}")
    return size


def _positions(config: dict[str, Any], folder: Path) -> int | None:
    found = ((name, _field(config, name)) for name in POSITION_FIELDS)
    name, limit = next(((n, value) for n, value in found if value is not None), ("", None))
    if limit is not None and not _is_positive(limit):
        raise ValueError(f"{folder / 'config.json'}: {name} is {limit!r}, not an integer over 0")
    return limit


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


def _eos_token_ids(
    folder: Path, config: dict[str, Any], tokenizer: Tokenizer, special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    generation = _read_json(folder / "generation_config.json", optional=True)
    value = generation.get("eos_token_id")
    if value is None:
        value = _field(config, "eos_token_id")
    if value is None:
        value = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{folder}: eos_token_id is {value!r}, not a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Named tokens as chat templates see them; a model may name some of its own."""
    named = {field: tokenizer_config.get(field) for field in SPECIAL_TOKEN_FIELDS}
    extra = tokenizer_config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    contents = {
        field: token.get("content") if isinstance(token, dict) else token
        for field, token in named.items()
    }
    return {field: content for field, content in contents.items() if isinstance(content, str)}


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return _read_text(folder / "chat_template.jinja")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _longest_token_bytes(tokenizer: Tokenizer) -> int:
    """The most bytes of text that one token can stand for."""
    spec = json.loads(tokenizer.to_str())
    if not _has_bounded_tokens(spec):
        return UNBOUNDED_BYTES
    byte_level = _is_byte_level(spec)
    vocab = (byte_level_bytes(t) if byte_level else t.encode() for t in spec["model"]["vocab"])
    added = (token["content"].encode() for token in spec["added_tokens"])
    longest = max(max(map(len, vocab), default=1), max(map(len, added), default=1))
    return longest * _normalizer_shrink(spec["normalizer"])


def _has_bounded_tokens(spec: dict[str, Any]) -> bool:
    """Whether no text vanishes: no word becomes one unknown token, no space is eaten."""
    model = spec["model"]
    knows_all_bytes = _is_byte_level(spec) or model.get("byte_fallback")
    eats_spaces = any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
    pre_tokenizer = json.dumps(spec["pre_tokenizer"])
    drops_text = any(f'"{word}"' in pre_tokenizer for word in DROPPING_PRE_TOKENIZERS)
    return (
        model.get("type") == "BPE"
        and bool(knows_all_bytes)
        and not eats_spaces
        and not drops_text
        and _normalizer_shrink(spec["normalizer"]) > 0
    )


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return (spec["decoder"] or {}).get("type") == "ByteLevel"


def _normalizer_shrink(normalizer: dict[str, Any] | None) -> int:
    """How many times shorter a normalizer can make a text; 0 if that is not known."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "NFC":
        return 3  # the worst: three Hangul letters, 9 bytes, to one syllable of 3
    if normalizer["type"] == "Sequence":
        return math.prod(_normalizer_shrink(member) for member in normalizer["normalizers"])
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return int(
            pattern is not None and len(normalizer["content"].encode()) >= len(pattern.encode())
        )
    return 0
