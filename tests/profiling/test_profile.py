"""`kvrelay profile` on a tiny model, with real engines in processes of their own."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import make_endless, make_not_decoder_only

from cluster.capacity.device import DeviceProfile, Measured
from cluster.cli import main
from cluster.profiling import profile
from cluster.profiling.profile import ProfileAsk
from cluster.profiling.served import Gaps, ServedTimes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless(tmp_path_factory.mktemp("tiny"))


def served(model: object, asked: object, link: str, on_progress: object) -> ServedTimes:
    """Ray takes its time, and its part has tests of its own."""
    return ServedTimes(
        link,
        exposed_ms={16: [2.0], 64: [5.0]},
        first_token_ms={16: [500.0]},
        gaps=[Gaps(1, 64, 400.0)],
    )


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_measure_served", served)


def run(model: Path, *args: str | Path) -> Result:
    small = ("--quick", "--quantize", "none", "--chunk-tokens", "64", "--kv-gib", "0.02")
    return CliRunner().invoke(main, ["profile", str(model), *small, *map(str, args)])


def test_a_profile_is_measured_and_written(tiny: Path, tmp_path: Path, without_ray: None):
    out = tmp_path / "tiny.json"
    result = run(tiny, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    found = DeviceProfile.read(out)
    assert isinstance(found.source, Measured)
    assert found.source.versions["kvrelay"]
    assert [one.link for one in found.hand_offs] == ["shm", "tcp"]
    assert (found.block_tokens, found.chunk_tokens) == (16, 64)
    assert found.kv_blocks == int(0.02 * 2**30) // found.block_bytes
    assert found.step.base_ms > 300.0  # most of a gap between two tokens, in what it was told
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["step/64@0"]["value"] > 0
    assert rows["step/64@0"]["baseline"] > 0
    assert rows["router"]["value"] == found.router_ms


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tiny: Path):
    result = run(tiny, "--out", tiny / "none" / "x.json")
    assert result.exit_code == 1
    assert "--out" in result.stderr
    assert "no folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_cannot_be_served_is_refused_in_one_line(tmp_path: Path):
    result = run(make_not_decoder_only(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_as_many_threads_as_serving_would_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert ProfileAsk().options("shm").threads_each == 4
    assert ProfileAsk(threads=3).options("shm").threads_each == 3


@pytest.mark.slow
def test_the_whole_command(tiny: Path, tmp_path: Path):
    result = run(tiny, "--out", tmp_path / "tiny.json")
    assert result.exit_code == 0, result.output
    found = DeviceProfile.read(tmp_path / "tiny.json")
    assert found.hand_off("tcp").fixed_ms > 0
    assert found.router_ms > 0
