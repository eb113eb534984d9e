"""Packing before the workers start: what a person sees of it, and how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from llama_shapes import make_random
from tiny_models import make_tiny

from cluster.preparation import ModelError
from cluster.weights import pack_weights
from kvrelay.engine.packing import prepare
from kvrelay.engine.prepared import WEIGHTS, find

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


class Seen:
    """What a progress bar is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float | None]] = []

    def __call__(self, what: str, fraction: float | None) -> None:
        self.steps.append((what, fraction))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(what for what, _ in self.steps))


def test_packing_shows_how_it_goes_in_order(llama, cache):
    seen = Seen()
    pack_weights(llama, "int8", cache, seen)
    assert seen.names == [
        "starting to pack the weights",
        "reading the model",
        "comparing with transformers",
        "packing weights",
        "writing packed weights",
        "loading weights",
    ]
    for name in ("packing weights", "loading weights"):
        parts = [fraction for what, fraction in seen.steps if what == name]
        assert parts == sorted(parts)
        assert parts[-1] == 1.0


def test_what_is_packed_is_only_read(llama, cache):
    prepared, seen = prepare(llama, "none", cache), Seen()
    before = (prepared.path / WEIGHTS).stat().st_mtime_ns
    pack_weights(llama, "none", cache, seen)
    assert seen.names == ["loading weights"]
    assert (prepared.path / WEIGHTS).stat().st_mtime_ns == before


def test_a_model_that_cannot_be_served_is_an_error_of_one_line(tmp_path, cache, capfd):
    path = make_random("MambaConfig", {"state_size": 4}, tmp_path / "mamba")
    capfd.readouterr()
    with pytest.raises(ModelError) as caught:
        pack_weights(path, "none", cache, Seen())
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(llama, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    with pytest.raises(ModelError, match="cannot write to the cache"):
        pack_weights(llama, "none", blocked, Seen())


def test_weights_that_cannot_be_read_are_an_error_of_one_line(llama, tmp_path, cache):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-4096] if file.suffix == ".safetensors" else data)
    with pytest.raises(ModelError) as caught:
        pack_weights(broken, "none", cache, Seen())
    assert "\n" not in str(caught.value)


def test_a_packer_that_dies_is_an_error_of_one_line(llama, cache, monkeypatch):
    def on_progress(what: str, fraction: float | None) -> None:
        if what == "reading the model":
            (child,) = packers()
            child.kill()

    with pytest.raises(ModelError, match="was ended by signal 9"):
        pack_weights(llama, "none", cache, on_progress)


def packers() -> list[psutil.Process]:
    """Packing processes that this one started and that still run."""
    children = psutil.Process().children()
    return [child for child in children if "kvrelay.engine.packing" in child.cmdline()]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_an_interrupt_ends_the_packer(llama, cache, failure):
    def on_progress(what: str, fraction: float | None) -> None:
        if what == "reading the model":
            assert len(packers()) == 1
            raise failure

    with pytest.raises(failure):
        pack_weights(llama, "none", cache, on_progress)
    assert packers() == []
    assert find(llama, "none", cache) is None


def test_ctrl_c_ends_both_quietly(llama, cache):
    """A terminal interrupts the whole group, which the packer is not in."""
    code = f"""
import sys
from pathlib import Path
from cluster.weights import pack_weights
def say(*said):
    print(*said, flush=True)
try:
    pack_weights(Path({str(llama)!r}), "none", Path({str(cache)!r}), say)
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "reading the model" not in process.stdout.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not group_lives(process.pid)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_needs_no_torch():
    code = "import sys, cluster.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
