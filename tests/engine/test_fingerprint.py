import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrelay.engine.fingerprint import SLICE_BYTES, SLICES, fingerprint


def write_model(folder: Path, *, body: bytes, config: dict | None = None, name="model") -> Path:
    """A folder with one safetensors file of a single tensor; the fingerprint looks no deeper."""
    header = {"w": {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}}
    encoded = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.safetensors"
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "a", body=bytes(range(256)) * 8192)  # 2 MiB: sampled


def test_is_64_hex_digits_and_stays_the_same(model):
    first = fingerprint(model)
    assert len(first) == 64
    assert int(first, 16) > 0
    assert fingerprint(model) == first


def test_a_copy_under_other_names_agrees(model, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "README.md").write_text("not weights")
    assert fingerprint(copy) == fingerprint(model)


def test_layout_and_provenance_of_the_config_do_not_count(tmp_path):
    a = write_model(tmp_path / "a", body=b"w", config={"model_type": "llama", "hidden_size": 8})
    b = write_model(tmp_path / "b", body=b"w")
    provenance = {"transformers_version": "9.9.9", "_name_or_path": "/somewhere"}
    reordered = {"hidden_size": 8, "model_type": "llama", **provenance}
    (b / "config.json").write_text(json.dumps(reordered, indent=4))
    assert fingerprint(a) == fingerprint(b)


def test_another_config_differs(model, tmp_path):
    other = tmp_path / "b"
    shutil.copytree(model, other)
    (other / "config.json").write_text('{"model_type": "llama", "rope_theta": 1000000}')
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("length", [1, 1000, SLICES * SLICE_BYTES, SLICES * SLICE_BYTES + 1])
def test_last_byte_counts_at_any_length(tmp_path, length):
    a = write_model(tmp_path / "a", body=bytes(length))
    b = write_model(tmp_path / "b", body=bytes(length - 1) + b"\x01")
    assert fingerprint(a) != fingerprint(b)


def test_every_byte_of_a_small_model_counts(tmp_path):
    body = bytearray(SLICES * SLICE_BYTES)
    reference = fingerprint(write_model(tmp_path / "a", body=bytes(body)))
    for position in range(0, len(body), 10_007):
        changed = body.copy()
        changed[position] = 1
        assert fingerprint(write_model(tmp_path / "b", body=bytes(changed))) != reference


def test_first_and_last_slices_of_a_large_model_count(model, tmp_path):
    file = model / "model.safetensors"
    reference, content = fingerprint(model), file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in (header_end, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        assert fingerprint(model) != reference


def test_the_header_counts_at_equal_size(tmp_path):
    a = write_model(tmp_path / "a", body=bytes(64))
    b = write_model(tmp_path / "b", body=bytes(64))
    file = b / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"U8"', b'"I8"'))
    assert fingerprint(a) != fingerprint(b)


def test_every_file_counts(tmp_path):
    folder = write_model(tmp_path / "a", body=b"one", name="model-00001-of-00002")
    alone = fingerprint(folder)
    write_model(folder, body=b"two", name="model-00002-of-00002")
    assert fingerprint(folder) != alone


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        fingerprint(tmp_path)
    write_model(tmp_path, body=b"w")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\xff" * 100])
def test_a_broken_weights_file_still_has_a_name(tmp_path, content):
    """Whether it can be loaded is for the loader to say."""
    folder = write_model(tmp_path, body=b"w")
    (folder / "model.safetensors").write_bytes(content)
    assert len(fingerprint(folder)) == 64


def test_takes_milliseconds_for_a_large_file(model):
    with (model / "model.safetensors").open("ab") as stream:
        stream.truncate(4 << 30)  # sparse: 4 GiB that take no room
    began = time.perf_counter()
    fingerprint(model)
    assert time.perf_counter() - began < 0.5  # about 2 ms alone; the machine may be busy


def test_needs_no_torch():
    code = (
        "import sys, kvrelay.engine.fingerprint; sys.exit('torch' in sys.modules"
        " or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
