"""Packed weights in the cache: made once and whole, mapped and not copied, never mistaken."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from float_models import unpacked_int8
from llama_shapes import make_random
from safetensors import safe_open
from tiny_models import make_tiny

from kvrelay.config import Quantize
from kvrelay.engine.fingerprint import fingerprint
from kvrelay.engine.packed import pack
from kvrelay.engine.packing import prepare
from kvrelay.engine.prepared import WEIGHTS, entry, find
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.shapes import LINE_BYTES, PANEL, PackedShape
from kvrelay.engine.step import UnsupportedModelError

MODES: tuple[Quantize, ...] = ("none", "int8")
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> Path:
    return make_tiny("phi", tmp_path_factory.mktemp("phi"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    return sorted(f.name for f in (cache / "prepared").iterdir() if f.suffix != ".lock")


def packer(model: Path, quantize: Quantize, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "kvrelay.engine.packing", str(model), quantize, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# ---- the format


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 64), (33, 65), (70, 100)])
def test_what_is_packed_in_fp32_is_the_weight(outputs, inputs):
    weight = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
    shape = PackedShape(outputs, inputs, int8=False)
    panels = pack(weight, shape).view(np.float32).reshape(shape.panels, inputs, PANEL)
    rows = panels.transpose(0, 2, 1).reshape(-1, inputs)
    assert (rows[:outputs] == weight).all()
    assert (rows[outputs:] == 0).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 64), (33, 65), (70, 100)])
def test_what_is_packed_in_int8_is_near_the_weight(outputs, inputs):
    weight = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
    shape = PackedShape(outputs, inputs, int8=True)
    packed = pack(weight, shape)
    assert packed.nbytes == shape.size_bytes
    whole, scales = unpacked_int8(packed, shape)
    near = (whole * scales[..., None]).reshape(outputs, -1)
    assert np.abs(whole).max() == 127
    assert (np.abs(near[:, :inputs] - weight) <= scales.max() / 2 * 1.001).all()
    assert (near[:, inputs:] == 0).all()


def test_a_weight_of_zeros_stays_zero_in_int8():
    shape = PackedShape(33, 65, int8=True)
    whole, scales = unpacked_int8(pack(np.zeros((33, 65), np.float32), shape), shape)
    assert (whole == 0).all()
    assert (scales > 0).all()


# ---- made once


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("model", ["llama", "phi"])
def test_a_second_load_writes_nothing(model, quantize, cache, request):
    path = request.getfixturevalue(model)
    assert find(path, quantize, cache) is None
    ModelRunner.load(path, quantize=quantize, cache_dir=cache).close()
    made = find(path, quantize, cache)
    assert made is not None
    before = {file: file.stat().st_mtime_ns for file in made.path.iterdir()}
    ModelRunner.load(path, quantize=quantize, cache_dir=cache).close()
    prepare(path, quantize, cache, lambda what, fraction: pytest.fail(what))
    assert {file: file.stat().st_mtime_ns for file in made.path.iterdir()} == before
    assert (made.shape is None) == (model == "phi")


def test_fp32_and_int8_are_apart(llama, cache):
    for quantize in MODES:
        prepare(llama, quantize, cache)
    assert len(entries(cache)) == 2
    none, int8 = (find(llama, quantize, cache) for quantize in MODES)
    assert none is not None
    assert int8 is not None
    assert int8.weights()["0.qkv"].nbytes < none.weights()["0.qkv"].nbytes / 3


@pytest.mark.parametrize("model", ["llama", "phi"])
def test_workers_that_differ_in_quantize_or_kv_type_do_not_pair(model, cache, request):
    path = request.getfixturevalue(model)

    def layout(quantize: Quantize, kv_dtype: str = "auto"):
        runner = ModelRunner.load(path, quantize=quantize, kv_dtype=kv_dtype, cache_dir=cache)
        runner.close()
        return runner.layout

    assert layout("int8").differences(layout("int8")) == ""
    assert "model_fingerprint" in layout("none").differences(layout("int8"))
    for kv_dtype in ("float16", "int8"):
        assert "dtype" in layout("none").differences(layout("none", kv_dtype))


def test_other_weights_of_the_same_name_are_another_entry(tmp_path, cache):
    for seed in (0, 1):
        path = make_tiny("llama", tmp_path / str(seed) / "model", seed=seed)
        prepare(path, "none", cache)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("model", ["llama", "phi"])
def test_progress_goes_forward(model, cache, request):
    steps: list[tuple[str, float | None]] = []
    path = request.getfixturevalue(model)
    prepare(path, "int8", cache, lambda what, fraction: steps.append((what, fraction)))
    compared = ["comparing with transformers"] if model == "llama" else []
    names = list(dict.fromkeys(what for what, _ in steps))
    assert names == [
        "reading the model", *compared, "packing weights", "writing packed weights",
    ]  # fmt: skip
    parts = [fraction for _, fraction in steps if fraction is not None]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


# ---- the file


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("size", ["tiny", "odd"])
def test_arrays_begin_at_a_cache_line_and_are_mapped(size, quantize, llama, cache, tmp_path):
    odd = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    path = llama if size == "tiny" else make_random("LlamaConfig", odd, tmp_path / "odd")
    made = prepare(path, quantize, cache)
    weights = made.weights()
    assert len(weights) > 10
    spans = mappings(made.path / WEIGHTS)
    for name, array in weights.items():
        assert array.ctypes.data % LINE_BYTES == 0, name
        assert any(start <= array.ctypes.data < end for start, end in spans), f"{name}: a copy"


def mappings(file: Path) -> list[tuple[int, int]]:
    """Where this process has mapped `file`."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = re.match(r"(\w+)-(\w+)", line).groups()
            spans.append((int(start, 16), int(end, 16)))
    return spans


def test_a_mapping_takes_no_memory_until_it_is_read(tmp_path, cache):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 20_000}
    made = prepare(make_random("LlamaConfig", wide, tmp_path / "wide"), "none", cache)
    size = (made.path / WEIGHTS).stat().st_size
    assert size > 40 << 20
    code = f"""
import sys
from pathlib import Path
from kvrelay.engine.prepared import Prepared
import torch  # so that its own memory is not counted

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) << 10
before = anonymous()
weights = Prepared.open(Path({str(made.path)!r})).weights()
total = sum(float(array.reshape(-1)[:: 1024].sum()) for array in weights.values())
print(anonymous() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < size / 4


def test_weights_cannot_be_changed_on_disk_through_a_mapping(llama, cache):
    made = prepare(llama, "none", cache)
    before = (made.path / WEIGHTS).read_bytes()
    array = made.weights()["final_norm"]
    if array.flags.writeable:
        array[:] = 7.0
    assert (made.path / WEIGHTS).read_bytes() == before


def test_warm_reads_to_the_end(llama, cache):
    parts: list[float | None] = []
    prepare(llama, "none", cache).warm(lambda what, fraction: parts.append(fraction))
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_a_fused_entry_holds_what_it_describes(llama, cache):
    made = prepare(llama, "int8", cache)
    assert made.shape is not None
    assert made.shape.int8
    assert made.model_fingerprint == fingerprint(llama) + "-int8"
    with safe_open(made.path / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    assert {"embedding", "head", "final_norm", "inv_freq", "2.down"} <= names


# ---- several processes, and ends


def test_two_packers_at_once_make_one_entry(llama, cache):
    both = [packer(llama, "int8", cache) for _ in range(2)]
    told = [said(process.communicate(timeout=DEADLINE_S)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(entries(cache)) == 1
    writers = [lines for lines in told if any("writing" in line["what"] for line in lines)]
    assert len(writers) == 1


def test_a_killed_packer_leaves_nothing_in_the_way(llama, cache):
    process = packer(llama, "none", cache)
    assert process.stdout is not None
    assert "reading the model" in process.stdout.readline()
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert find(llama, "none", cache) is None
    prepare(llama, "none", cache)
    assert len(entries(cache)) == 1


def test_nobody_sees_an_entry_half_made(llama, cache, monkeypatch):
    held, go_on = threading.Event(), threading.Event()

    def on_progress(what: str, fraction: float | None) -> None:
        if what == "writing packed weights":
            held.set()
            assert go_on.wait(DEADLINE_S)

    thread = threading.Thread(target=prepare, args=(llama, "none", cache, on_progress))
    thread.start()
    assert held.wait(DEADLINE_S)
    assert find(llama, "none", cache) is None
    go_on.set()
    thread.join()
    assert find(llama, "none", cache) is not None


def test_what_cannot_be_served_leaves_no_entry(tmp_path, cache):
    path = make_random("MambaConfig", {"state_size": 4}, tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(path, "none", cache)
    assert "\n" not in str(caught.value)
    assert entries(cache) == []


def test_a_damaged_entry_is_made_again(llama, cache):
    """As after a disk that was full, or a file that somebody cut."""
    made = prepare(llama, "none", cache)
    file = made.path / WEIGHTS
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2)
    ModelRunner.load(llama, cache_dir=cache).close()
    assert file.read_bytes() == whole


def test_an_entry_without_its_description_is_made_again(llama, cache):
    made = prepare(llama, "none", cache)
    (made.path / "prepared.json").unlink()
    ModelRunner.load(llama, cache_dir=cache).close()
    assert find(llama, "none", cache) is not None


def test_weights_written_again_are_packed_again(llama, cache):
    before = prepare(llama, "none", cache)
    file = llama / "model.safetensors"
    os.utime(file, ns=(1, 1))  # a change that falls between the fingerprint's samples
    try:
        assert find(llama, "none", cache) is None
        os.utime(before.path, (1, 1))
        after = prepare(llama, "none", cache)
        assert after.path != before.path
        assert not before.path.exists()  # it was old
    finally:
        os.utime(file)


def test_an_entry_is_found_by_the_weights_and_not_by_the_folder(llama, cache, tmp_path):
    moved = tmp_path / llama.name
    moved.symlink_to(llama)
    prepare(llama, "none", cache)
    assert find(moved, "none", cache) is not None
    assert entry(llama, "none", cache).is_dir()
