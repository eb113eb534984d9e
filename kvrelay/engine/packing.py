"""Packs a model's weights into the cache, once, and proves that the fused model computes the same.

Called by ModelRunner.load where nothing is prepared. cluster/weights.py runs it before that, as
`python -m kvrelay.engine.packing`, in a process of its own: so a person sees how it goes, and no
worker ever holds the unpacked weights.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from kvrelay.cache import CacheError, build_once
from kvrelay.config import Quantize
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.fused import FusedModel
from kvrelay.engine.fused_weights import find_shape, packed_weights
from kvrelay.engine.generic import (
    GenericModel,
    linear_names,
    linear_weights,
    load_model,
    pack_linears,
)
from kvrelay.engine.kernels.threads import Team, aligned
from kvrelay.engine.prepared import WEIGHTS, Prepared, Progress, entry, open_whole
from kvrelay.engine.probe import ERROR_MAX, ERROR_MAX_INT8, Watched, check_logits, watch
from kvrelay.engine.shapes import LINE_BYTES, FusedShape
from kvrelay.engine.step import CancelFlag, Slice, UnsupportedModelError
from kvrelay.kv.pool import KVPool

log = logging.getLogger(__name__)

_KEPT_DAYS = 7


def prepare(
    model_path: Path,
    quantize: Quantize,
    cache_dir: Path,
    on_progress: Progress = lambda what, fraction: None,
) -> Prepared:
    """The packed weights of the fp32 model in `model_path`, made now if the cache has none.

    Raises:
        UnsupportedModelError: the model cannot be served; one line.
        CacheError: the cache cannot be written; one line.
    """
    weights = fingerprint(model_path)
    # KV of the two is not the same: workers that differ in it must not pair.
    own = weights if quantize == "none" else f"{weights}-{quantize}"

    def build(partial: Path) -> None:
        _build(model_path, quantize, own, partial, on_progress)

    def on_wait() -> None:
        on_progress("waiting for another start that prepares the same weights", None)

    def is_whole(path: Path) -> bool:
        return open_whole(path) is not None

    path = entry(model_path, quantize, cache_dir)
    if (found := open_whole(path)) is not None:
        return found
    made = Prepared.open(build_once(path, build, on_wait, is_whole))
    _remove_superseded(made)
    return made


def _remove_superseded(made: Prepared) -> None:
    """Removes entries for the same weights that other versions of the code, or of the files, made
    long ago. Workers that have mapped one keep what they have."""
    long_ago = time.time() - _KEPT_DAYS * 86_400
    for other in made.path.parent.iterdir():
        found = open_whole(other)
        if found is None or found.model_fingerprint != made.model_fingerprint:
            continue
        if other != made.path and other.stat().st_mtime <= long_ago:
            shutil.rmtree(other, ignore_errors=True)


def _build(
    model_path: Path, quantize: Quantize, own: str, folder: Path, on_progress: Progress
) -> None:
    on_progress("reading the model", None)
    model = load_model(model_path, "float32", "cpu")
    watched = watch(model)
    shape = find_shape(model, watched.probe, int8=False)
    if shape is not None:
        # In float32 whatever is asked for: int8 is too far from it to tell a wrong shape by.
        on_progress("comparing with transformers", None)
        if not _is_equal(watched, shape, dict(packed_weights(model, shape)), own):
            shape = None
    int8 = quantize == "int8"
    if shape is not None:
        shape = replace(shape, int8=int8)
        arrays = _packed(packed_weights(model, shape), shape.arrays, on_progress)
        if int8 and not _is_equal(watched, shape, arrays, own):
            shape = None
    if shape is None:
        count = len(linear_names(model))
        arrays = _packed(linear_weights(model, int8), count, on_progress)
        _check_generic(model, watched, arrays, own, int8)
    on_progress("writing packed weights", None)
    _save(arrays, folder / WEIGHTS)
    Prepared(folder, own, shape).describe()


def _packed(
    weights: Iterator[tuple[str, np.ndarray]], count: int, on_progress: Progress
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, array in weights:
        arrays[name] = array
        on_progress("packing weights", min(1.0, len(arrays) / max(1, count)))
    return arrays


def _check_generic(
    model: Any, watched: Watched, arrays: Mapping[str, np.ndarray], own: str, int8: bool
) -> None:
    generic = GenericModel(model, Team(1))
    pack_linears(model, _lined_up(arrays), int8, generic.team)
    generic.check(watched, watched.layout(own, "float32", 1), int8=int8)
    generic.close()


def _is_equal(
    watched: Watched, shape: FusedShape, arrays: Mapping[str, np.ndarray], own: str
) -> bool:
    fused = FusedModel(shape, _lined_up(arrays), Team(1))

    def run(pool: KVPool, chunk: Slice) -> torch.Tensor:
        fused.attach(pool)
        return torch.from_numpy(fused.step([chunk], [len(chunk.tokens) - 1], CancelFlag())[0])

    try:
        error_max = ERROR_MAX_INT8 if shape.int8 else ERROR_MAX["float32"]
        check_logits(watched, watched.layout(own, "float32", 1), run, error_max)
    except UnsupportedModelError as error:
        log.warning("%s; it goes the generic way", error)
        return False
    finally:
        fused.close()
    return True


def _lined_up(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays where the kernels can read them: at multiples of 64."""
    result = {}
    for name, array in arrays.items():
        copy = aligned(array.size, array.dtype).reshape(array.shape)
        copy[...] = array
        result[name] = copy
    return result


def _save(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    """Every array begins at a multiple of 64 in the file, so also in a mapping of it.

    The format packs arrays tightly after a header; so each is as long as a multiple of 64, and a
    remark in the header makes it as long as needed.
    """
    padded: dict[str, Any] = {}
    for name, array in arrays.items():
        assert array.nbytes % LINE_BYTES == 0, f"{name}: {array.nbytes} bytes"
        padded[name] = np.ascontiguousarray(array)
    save_file(padded, file, metadata={"pad": ""})
    missing = -_data_begins(file) % LINE_BYTES
    if missing:
        save_file(padded, file, metadata={"pad": "-" * missing})
    assert _data_begins(file) % LINE_BYTES == 0


def _data_begins(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def main() -> None:
    """Arguments: model folder, quantize, cache folder. Prints one JSON object a line: `what` and
    `fraction` as it goes on, or `error`."""
    path, quantize, cache_dir = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        prepare(
            Path(path), quantize, Path(cache_dir),  # type: ignore[arg-type]
            lambda what, fraction: say(what=what, fraction=fraction),
        )  # fmt: skip
    except (CacheError, UnsupportedModelError) as error:
        say(error=str(error))
        sys.exit(1)
    except Exception as error:  # transformers raises all kinds: to the person they are one
        log.debug("packing failed", exc_info=True)
        say(error=f"{Path(path).name} cannot be packed: {' '.join(str(error).split())}")
        sys.exit(1)


if __name__ == "__main__":
    main()
