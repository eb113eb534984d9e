"""Packed weights on disk: an entry of the cache, found and mapped by every worker of the host.

packing.py makes entries; ModelRunner.load and cluster/weights.py look for them here. An entry is a
folder with one safetensors file and a description of what it holds. Light to import.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from kvrelay.config import Quantize
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.shapes import FusedShape
from kvrelay.kv.layout import KVLayout

Progress = Callable[[str, float | None], None]

WEIGHTS = "packed.safetensors"
_DESCRIPTION = "prepared.json"
_FORMAT = 1  # part of every entry's name: raise it when what is written there changes
_WARM_BYTES = 16 << 20
_NAME_CHARS_MAX = 48


@dataclass(frozen=True)
class Prepared:
    """What an entry holds. shape: None for a model that goes the generic way."""

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

    def describe(self) -> None:
        """Writes what `open` reads."""
        described = {
            "model_fingerprint": self.model_fingerprint,
            "shape": asdict(self.shape) if self.shape else None,
        }
        (self.path / _DESCRIPTION).write_text(json.dumps(described, indent=1))

    def weights(self) -> dict[str, np.ndarray]:
        """Every array, mapped from the file: all who map it share the memory."""
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
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
        file = self.path / WEIGHTS
        total, done = file.stat().st_size, 0
        buffer = bytearray(_WARM_BYTES)
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                done += count
                on_progress("loading weights", done / total)


def find(model_path: Path, quantize: Quantize, cache_dir: Path) -> Prepared | None:
    """The packed weights of the fp32 model in `model_path`, if they have been made."""
    path = entry(model_path, fingerprint(model_path), quantize, cache_dir)
    return Prepared.open(path) if path.is_dir() else None


def entry(model_path: Path, weights: str, quantize: Quantize, cache_dir: Path) -> Path:
    """Where the entry for weights of that fingerprint is, or would be."""
    name = f"{model_path.name[:_NAME_CHARS_MAX]}-{weights[:16]}-{quantize}-v{_FORMAT}"
    return cache_dir / "prepared" / name
