"""A model's folder: owns whether kvrelay can serve what is in it, and what is said if it cannot.

Called by model_store for every folder, and by hub before it fetches weights. Imports neither torch
nor transformers: most starts find everything in order, and those shall not wait for them.
"""

import ast
import importlib
import importlib.util
import json
from functools import cache as cached
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.preparation import ModelError, one_line


def check_config(folder: Path, shown: str) -> None:
    """Raises ModelError, which calls the model `shown`, unless it is decoder-only."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{shown} has no config.json: give the folder of a transformers model, or a .gguf file"
        )
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{shown}: config.json cannot be read: {one_line(error)}") from error
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


def check_weights(folder: Path, shown: str) -> None:
    """Raises ModelError, which calls the model `shown`, unless its safetensors are all whole."""
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
                f"{shown}: {file.name} is damaged ({one_line(error)}): download it again"
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
