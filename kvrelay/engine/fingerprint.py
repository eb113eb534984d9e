"""Owns the name of a model's weights: a digest that two hosts compute alone and then compare.

Workers put it in their KvLayout, so KV never moves between different models; the model store in
cluster/ keys its cache with `update_sampled`. Needs no torch.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Protocol

SLICES = 64
SLICE_BYTES = 4096
_HEADER_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, u64
# Written by whichever transformers saved the folder: says nothing about the weights.
_CONFIG_PROVENANCE = ("_name_or_path", "transformers_version")


class Digest(Protocol):
    """What hashlib and xxhash objects have in common."""

    def update(self, data: bytes, /) -> None: ...


def fingerprint(path: Path) -> str:
    """64 hex digits that name the weights of the model folder `path`.

    Covers config.json (not its formatting) and, of each *.safetensors file in order of name, the
    size, the header and 64 slices of 4 KiB: any retraining shows, a change of a few tensor bytes
    may not. The names themselves do not count; how the weights are cut into files does.

    Raises FileNotFoundError without config.json or weights, ValueError for a broken config.json.
    """
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{path}: no *.safetensors")
    digest = hashlib.sha256(_canonical_config(path / "config.json"))
    for file in weights:
        update_sampled(digest, file, head_bytes=_header_bytes(file))
    return digest.hexdigest()


def update_sampled(digest: Digest, file: Path, *, head_bytes: int) -> None:
    """Adds to `digest` the size of `file`, its first `head_bytes` and slices spread over the rest.

    A rest that is not longer than the slices together is read whole.
    """
    size = file.stat().st_size
    digest.update(struct.pack("<QQ", size, head_bytes))
    with file.open("rb") as stream:
        digest.update(stream.read(head_bytes))
        if size - head_bytes <= SLICES * SLICE_BYTES:
            digest.update(stream.read())
            return
        last = size - SLICE_BYTES
        for index in range(SLICES):
            stream.seek(head_bytes + (last - head_bytes) * index // (SLICES - 1))
            digest.update(stream.read(SLICE_BYTES))


def _canonical_config(file: Path) -> bytes:
    config = json.loads(file.read_bytes())
    for key in _CONFIG_PROVENANCE:
        config.pop(key, None)
    return json.dumps(config, sort_keys=True).encode()


def _header_bytes(file: Path) -> int:
    """Length of the header with its length field; of a file too short for one, its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        field = stream.read(_HEADER_LENGTH_BYTES)
    if len(field) < _HEADER_LENGTH_BYTES:
        return size
    return int(min(size, _HEADER_LENGTH_BYTES + struct.unpack("<Q", field)[0]))
