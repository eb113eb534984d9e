"""Packed weights on disk: an entry of the cache, found and mapped by every worker of the host.

packing.py makes entries; ModelRunner.load and cluster/weights.py look for them here. An entry is a
folder with one safetensors file and a description of what it holds. Light to import.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
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
_WARM_BYTES = 16 << 20
_NAME_CHARS_MAX = 48
_DECIDING = (
    "fused",
    "fused_weights",
    "generic",
    "packed",
    "packing",
    "prepared",
    "probe",
    "shapes",
)


@dataclass(frozen=True)
class Prepared:
    """What an entry holds. shape: None for a model that goes the generic way."""

    path: Path
    model_fingerprint: str
    shape: FusedShape | None

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """Raises OSError, ValueError or KeyError for an entry that is not whole."""
        described = json.loads((path / _DESCRIPTION).read_bytes())
        if (path / WEIGHTS).stat().st_size != described["weights_bytes"]:
            raise ValueError(f"{path / WEIGHTS} is not whole")
        shape = described["shape"]
        if shape is not None:
            shape = FusedShape(**{**shape, "windows": tuple(shape["windows"])})
        return cls(path, described["model_fingerprint"], shape)

    def describe(self) -> None:
        """Writes what `open` reads."""
        described = {
            "model_fingerprint": self.model_fingerprint,
            "weights_bytes": (self.path / WEIGHTS).stat().st_size,
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
    """The packed weights of the fp32 model in `model_path`, if they are there and whole."""
    return open_whole(entry(model_path, quantize, cache_dir))


def open_whole(path: Path) -> Prepared | None:
    """The entry at `path` if it is there, and all of it."""
    try:
        return Prepared.open(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def entry(model_path: Path, quantize: Quantize, cache_dir: Path) -> Path:
    """Where the entry for the model folder, as it is now, is or would be.

    Its name covers the weights' fingerprint, which samples them, and when their files were written;
    and the code that decides what an entry holds.
    """
    digest = hashlib.sha256(fingerprint(model_path).encode() + _code())
    for file in sorted(model_path.glob("*.safetensors")):
        digest.update(str(file.stat().st_mtime_ns).encode())
    name = f"{model_path.name[:_NAME_CHARS_MAX]}-{quantize}-{digest.hexdigest()[:16]}"
    return cache_dir / "prepared" / name


@functools.cache
def _code() -> bytes:
    """Of what decides what is packed, and of what it was compared with."""
    here = Path(__file__).parent
    files = sorted([*(here / f"{name}.py" for name in _DECIDING), *here.glob("kernels/*.py")])
    digest = hashlib.sha256(version("transformers").encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.digest()
