"""The cache: where it is, and that an entry is whole or not there."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvrelay import cache
from kvrelay.cache import CacheError, build_once, default_cache


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "cache" / "models" / "m"


def nobody_waits() -> None:
    pytest.fail("nobody else builds")


def never_called(partial: Path) -> None:
    pytest.fail("built twice")


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVRELAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == tmp_path / ".cache" / "kvrelay"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "kvrelay"
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


def test_the_cache_is_the_same_from_every_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVRELAY_CACHE", "here")
    assert default_cache() == tmp_path / "here"


def test_it_needs_no_torch():
    code = "import sys, kvrelay.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_entry_is_built_once(target):
    def build(partial: Path) -> None:
        (partial / "below").mkdir()
        (partial / "below" / "weights").write_text("w")
        (partial / "link").symlink_to("/no/such/file")

    assert build_once(target, build, nobody_waits) == target
    assert (target / "below" / "weights").read_text() == "w"
    assert build_once(target, never_called, nobody_waits) == target
    assert left_in(target.parent) == ["m"]


def test_what_a_killed_builder_left_is_not_used(target):
    partial = target.with_name("m.partial")
    partial.mkdir(parents=True)
    (partial / "half").touch()
    build_once(target, lambda folder: (folder / "whole").touch(), nobody_waits)
    assert left_in(target) == ["whole"]
    assert left_in(target.parent) == ["m"]


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt()])
def test_what_a_build_raises_passes_through_and_leaves_nothing(target, failure):
    def build(partial: Path) -> None:
        (partial / "half").touch()
        assert not target.exists()
        raise failure

    with pytest.raises(type(failure)) as caught:
        build_once(target, build, nobody_waits)
    assert caught.value is failure
    assert left_in(target.parent) == []


def test_a_full_disk_is_said_in_one_line(target):
    def build(partial: Path) -> None:
        (partial / "half").touch()
        raise OSError(28, "No space left on device", "a\nb")

    with pytest.raises(CacheError) as caught:
        build_once(target, build, nobody_waits)
    message = str(caught.value)
    assert "\n" not in message
    assert "No space left on device" in message
    assert "set KVRELAY_CACHE to another folder" in message
    assert left_in(target.parent) == []


def test_a_cache_that_is_a_file(target):
    target.parents[1].write_text("")
    with pytest.raises(CacheError, match="cannot write to the cache"):
        build_once(target, never_called, nobody_waits)


def test_who_comes_second_waits_and_gets_what_the_first_built(target):
    began, waits = threading.Event(), threading.Event()

    def build(partial: Path) -> None:
        began.set()
        assert waits.wait(30)
        (partial / "whole").touch()

    first = threading.Thread(target=build_once, args=(target, build, nobody_waits))
    first.start()
    assert began.wait(30)
    build_once(target, never_called, waits.set)
    assert left_in(target) == ["whole"]
    first.join(30)


def test_who_waits_too_long_is_told_who_is_at_it(target, monkeypatch):
    monkeypatch.setattr(cache, "_BUILD_WAIT_S", 0.05)
    waited: list[bool] = []

    def build(partial: Path) -> None:
        with pytest.raises(CacheError, match=r"m\.lock: end it and start again"):
            build_once(target, never_called, lambda: waited.append(True))

    build_once(target, build, nobody_waits)
    assert waited == [True]
