"""Packed weights on disk: made once from a model folder, then mapped by every worker of the host.

`prepare` is called by ModelRunner.load, and before that by cluster/ in a process of its own, so
that a person sees how it goes and a worker never holds the unpacked weights. An entry of the cache
is a folder with one safetensors file and a description of what it holds.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from kvrelay.cache import build_once, default_cache
from kvrelay.config import Quantize
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.fused import FusedModel, FusedShape
from kvrelay.engine.kernels.threads import aligned
from kvrelay.engine.step import CancelFlag, Slice, UnsupportedModelError
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool

if TYPE_CHECKING:
    from kvrelay.engine.probe import Watched

log = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]

_FORMAT = 1  # part of every key: raise it when what is written here changes
_DESCRIPTION = "prepared.json"
_WEIGHTS = "packed.safetensors"
_LINE_BYTES = 64
_WARM_BYTES = 16 << 20


@dataclass(frozen=True)
class Prepared:
    """One entry of the cache. shape: None for a model that goes the generic way."""

    path: Path
    model_fingerprint: str
    shape: FusedShape | None

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        described = json.loads((path / _DESCRIPTION).read_bytes())
        shape = described["shape"]
        if shape is not None:
            shape = FusedShape(**{**shape, "windows": tuple(shape["windows"])})
        return cls(path, described["model_fingerprint"], shape)

    def weights(self) -> dict[str, np.ndarray]:
        """Every array, mapped from the file: memory is shared by all who map it."""
        with safe_open(self.path / _WEIGHTS, framework="pt") as file:
            return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118

    def layout(self, dtype: str, block_size: int) -> KVLayout:
        """Of the KV that the fused model stores."""
        shape = self.shape
        assert shape is not None
        return KVLayout(
            self.model_fingerprint,
            dtype,
            layers=shape.layers,
            block_size=block_size,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )

    def warm(self, on_progress: Progress) -> None:
        """Reads the weights into the page cache, where the workers' mappings find them."""
        file = self.path / _WEIGHTS
        total, done = file.stat().st_size, 0
        with file.open("rb", buffering=0) as stream:
            buffer = bytearray(_WARM_BYTES)
            while count := stream.readinto(buffer):
                done += count
                on_progress("loading weights", done / total)


def prepare(
    model_path: Path,
    *,
    quantize: Quantize,
    cache_dir: Path | None = None,
    on_progress: Progress = lambda what, fraction: None,
) -> Prepared:
    """The packed weights of the fp32 model in `model_path`, made now if the cache has none.

    Raises:
        UnsupportedModelError: the model cannot be served; one line.
        CacheError: the cache cannot be written; one line.
    """
    weights = fingerprint(model_path)
    target = _entry(cache_dir or default_cache(), model_path, weights, quantize)
    # KV of the two is not the same: workers that differ in it must not pair.
    own = weights if quantize == "none" else f"{weights}-{quantize}"

    def build(partial: Path) -> None:
        _build(model_path, quantize, own, partial, on_progress)

    def on_wait() -> None:
        on_progress("waiting for another start that prepares the same weights", None)

    return Prepared.open(build_once(target, build, on_wait))


def is_prepared(model_path: Path, *, quantize: Quantize, cache_dir: Path) -> bool:
    return _entry(cache_dir, model_path, fingerprint(model_path), quantize).is_dir()


def _entry(cache_dir: Path, model_path: Path, weights: str, quantize: Quantize) -> Path:
    name = f"{model_path.name[:48]}-{weights[:16]}-{quantize}-v{_FORMAT}"
    return cache_dir / "prepared" / name


def _build(
    model_path: Path, quantize: Quantize, own: str, folder: Path, on_progress: Progress
) -> None:
    # transformers takes seconds to import, and a start that finds all prepared does not need it.
    from kvrelay.engine.fused_weights import find_shape, packed_weights
    from kvrelay.engine.generic import linear_weights, load_model
    from kvrelay.engine.probe import watch

    on_progress("reading the model", None)
    model = load_model(model_path, "float32", "cpu")
    watched = watch(model)
    int8 = quantize == "int8"
    shape = find_shape(model, watched.probe, int8)
    arrays = {}
    if shape is not None:
        parts = 4 + shape.layers * (7 + shape.qkv_bias + 2 * shape.qk_norm)
        for name, array in packed_weights(model, shape):
            arrays[name] = array
            on_progress("packing weights", min(1.0, len(arrays) / parts))
        on_progress("comparing with transformers", None)
        if not _is_equal(watched, shape, arrays, own):
            shape = None
    if shape is None:
        on_progress("packing weights", None)
        arrays = dict(linear_weights(model, int8))
    on_progress("writing packed weights", None)
    _save(arrays, folder / _WEIGHTS)
    description = {"model_fingerprint": own, "shape": asdict(shape) if shape else None}
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1))


def _is_equal(
    watched: "Watched", shape: FusedShape, arrays: Mapping[str, np.ndarray], own: str
) -> bool:
    from kvrelay.engine.probe import ERROR_MAX, ERROR_MAX_INT8, check_logits

    fused = FusedModel(shape, _lined_up(arrays), threads=1)

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
        assert array.nbytes % _LINE_BYTES == 0, f"{name}: {array.nbytes} bytes"
        padded[name] = np.ascontiguousarray(array)
    save_file(padded, file, metadata={"pad": ""})
    missing = -_data_begins(file) % _LINE_BYTES
    if missing:
        save_file(padded, file, metadata={"pad": "-" * missing})
    assert _data_begins(file) % _LINE_BYTES == 0


def _data_begins(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")
