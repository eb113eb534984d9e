import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import (
    BOS,
    EOS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from router.model_files import UNBOUNDED_BYTES, ModelFiles


def model_folder(path: Path, tokenizer: Tokenizer | None = None, **files: Any) -> Path:
    """A folder with a tokenizer and JSON files: config={...} becomes config.json."""
    (tokenizer or byte_level_tokenizer()).save(str(path / "tokenizer.json"))
    for name, content in {"config": {"vocab_size": 300}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def load(path: Path, tokenizer: Tokenizer | None = None, **files: Any) -> ModelFiles:
    return ModelFiles.load(model_folder(path, tokenizer, **files), "tiny")


def test_a_whole_folder(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        config={"vocab_size": 300, "max_position_embeddings": 512, "eos_token_id": 7},
        generation_config={"eos_token_id": [260, 7, 260]},
        tokenizer_config={"bos_token": BOS, "eos_token": {"content": EOS}, "chat_template": "hi"},
    )
    assert (model.name, model.vocab_size, model.max_position_embeddings) == ("tiny", 300, 512)
    assert model.eos_token_ids == (260, 7)
    assert model.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert model.chat_template == "hi"
    assert model.tokenizer.encode(" the").ids == [258]


def test_only_config_and_tokenizer_are_needed(tmp_path: Path) -> None:
    model = load(tmp_path)
    assert model.max_position_embeddings is None
    assert model.eos_token_ids == ()
    assert model.chat_template is None
    assert model.special_tokens == {}


def test_limits_may_be_nested_or_have_another_name(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 260, "n_positions": 64, "eos_token_id": 5}}
    model = load(tmp_path, config=config)
    assert (model.vocab_size, model.max_position_embeddings) == (260, 64)
    assert model.eos_token_ids == (5,)


def test_the_end_token_may_be_known_by_its_spelling_alone(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        generation_config={"eos_token_id": None},
        tokenizer_config={"eos_token": EOS},
    )
    assert model.eos_token_ids == (byte_level_tokenizer().token_to_id(EOS),)


def test_a_template_file_comes_before_the_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from file\n")
    model = load(tmp_path, tokenizer_config={"chat_template": "from config"})
    assert model.chat_template == "from file\n"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    assert load(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "b"
    assert load(tmp_path, tokenizer_config={"chat_template": named[:1]}).chat_template is None


def test_a_model_may_name_special_tokens_of_its_own(tmp_path: Path) -> None:
    model = load(tmp_path, tokenizer_config={"extra_special_tokens": {"image_token": "<img>"}})
    assert model.special_tokens == {"image_token": "<img>"}


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert len(load(tmp_path, tokenizer).tokenizer.encode("abcd").ids) == 4


def eats_spaces() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    return tokenizer


def drops_spaces() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def normalized(normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        (byte_level_tokenizer(), len(BOS)),
        (byte_level_tokenizer(specials=["é"]), len(" the")),
        (byte_level_tokenizer(specials=["€" * 9]), 27),
        (normalized(normalizers.NFC()), 3 * len(BOS)),
        (normalized(normalizers.Replace(" ", "▁")), len(BOS)),
        (normalized(normalizers.Replace("aa", "a")), UNBOUNDED_BYTES),
        (normalized(normalizers.Strip()), UNBOUNDED_BYTES),
        (byte_fallback_tokenizer(), len("<0x00>")),
        (eats_spaces(), UNBOUNDED_BYTES),
        (drops_spaces(), UNBOUNDED_BYTES),
        (metaspace_tokenizer(), UNBOUNDED_BYTES),
    ],
)
def test_longest_token(tmp_path: Path, tokenizer: Tokenizer, longest: int) -> None:
    assert load(tmp_path, tokenizer).longest_token_bytes == longest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot read .*config.json: No such file"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", "{}", "no vocab_size over 0, but None"),
        ("config.json", '{"vocab_size": "9"}', "no vocab_size over 0, but '9'"),
        (
            "config.json",
            '{"vocab_size": 9, "n_positions": 0}',
            "n_positions is 0, not an integer over 0",
        ),
        ("config.json", '{"vocab_size": 9, "eos_token_id": -1}', "eos_token_id is -1"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', "eos_token_id is .'x'."),
        ("tokenizer.json", None, "cannot read .*tokenizer.json: No such file"),
        ("tokenizer.json", '{"version":\n"1.0"}', "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template is not text"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    file = model_folder(tmp_path) / name
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as refused:
        ModelFiles.load(tmp_path, "tiny")
    assert "\n" not in str(refused.value)


def test_the_router_brings_no_torch_with_it() -> None:
    imports = "import sys, router.model_files, router.chat, router.detokenize, router.admission; "
    found = "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", imports + found], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
