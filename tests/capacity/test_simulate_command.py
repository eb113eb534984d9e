"""The command: what it prints, and its refusals in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.capacity import cells
from cluster.capacity.cells import simulate_cells
from cluster.capacity.commands import known_profiles, read_profile, simulate
from cluster.capacity.device import DeviceProfile
from cluster.capacity.parcels import WorkloadParcel
from cluster.capacity.run import Setting, SimulationError
from cluster.workload.mixes import make_mix

A100 = "a100-80gb-opt-13b"
TRACE = '{"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}\n'


def run(*words: str, fails: bool = False) -> str:
    result = CliRunner().invoke(simulate, words)
    assert (result.exit_code != 0) == fails, result.output
    if fails:
        assert result.stderr.count("\n") <= 4, result.stderr
        return result.stderr
    return result.stdout


def test_a_mix_brings_a_table_and_json():
    words = ("--mix", "uniform", "--requests", "20", "--profile", A100, "--rate", "2")
    table = run(*words)
    assert "SLO attainment" in table
    assert "entered by hand" in table
    told = json.loads(run(*words, "--json", "--router-cost"))
    assert told["figures"]["requests"] == 20
    assert told["figures"]["failed"] == 0
    assert told["simulation"]["router: submit"] > 0
    assert told["setting"]["prefill"] == 1


def test_a_trace_keeps_its_own_times(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(TRACE + TRACE.replace('"timestamp": 0', '"timestamp": 2000'))
    told = json.loads(run("--trace", str(file), "--profile", A100, "--json"))
    assert told["figures"]["requests"] == 2
    assert told["figures"]["cached_share"] == pytest.approx(576 / 1200)


def test_a_page_is_written(tmp_path):
    page = tmp_path / "page.html"
    run("--mix", "chat", "--requests", "10", "--profile", A100, "--report", str(page))
    assert "<svg" in page.read_text()


def test_the_highest_rate_is_found():
    words = ("--mix", "uniform", "--requests", "60", "--profile", A100, "--ttft-ms", "500")
    told = json.loads(run(*words, "--find-rate", "--json", "--tpot-ms", "60"))
    assert told["figures"]["attainment"] >= 0.9
    assert 0.5 < told["figures"]["offered_rps"] < 30
    assert min(share for _, share in told["tried"]) < 0.9


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile", A100], "what is asked?"),
        (["--profile", A100, "--mix", "chat", "--rate-scale", "2"], "goes with --trace alone"),
        (["--profile", A100, "--mix", "chat", "--prompt", "1:2"], "goes with --mix uniform"),
        (["--profile", A100, "--trace", "no.csv"], "No such file"),
        (["--profile", "h100", "--mix", "chat"], f"one of {A100}"),
        (["--profile", A100, "--mix", "chat", "--link", "tcp"], "has no link tcp"),
        (["--profile", A100, "--mix", "chat", "--ttft-ms", "0"], "above 0"),
        (["--profile", A100, "--mix", "chat", "--find-rate", "--rate", "3"], "drop one of them"),
        (["--profile", A100, "--mix", "chat", "--requests", "9", "--jobs", "5"], "fewer jobs"),
    ],
)
def test_bad_choices_are_refused_in_one_line(words, told):
    error = run(*words, fails=True)
    assert told in error
    assert "Traceback" not in error


def test_every_profile_that_comes_along_can_be_read_and_says_its_source():
    assert A100 in known_profiles()
    for name in known_profiles():
        assert str(read_profile(name).source).startswith("entered by hand from ")


class InTurn:
    """In the place of a cell's process."""

    def begin(self, setting: Setting, parcel: WorkloadParcel) -> None:
        self.asked = (setting, parcel)

    def wait(self) -> Any:
        return cells._play(*self.asked)

    def end(self) -> None:
        """Nothing was begun."""


def check_cells(device: DeviceProfile) -> None:
    workload = make_mix("uniform", 10.0, None, 1, requests=40, prompt=(8, 60), answer=(2, 9))
    setting = Setting(device, 2, 3)
    played = simulate_cells(setting, workload, 2)
    assert [outcome.ask for outcome in played.outcomes] == list(workload.asks)
    assert not any(outcome.error for outcome in played.outcomes)
    with pytest.raises(SimulationError, match="fewer jobs"):
        simulate_cells(setting, workload, 3)


def test_cells_share_out_workers_and_requests(device, monkeypatch):
    monkeypatch.setattr(cells, "_Cell", InTurn)
    check_cells(device)


def test_as_many_workers_die_however_many_cells_there_are(device, monkeypatch):
    monkeypatch.setattr(cells, "_Cell", InTurn)
    workload = make_mix("uniform", 4.0, None, 1, requests=40, prompt=(8, 60), answer=(2, 9))
    setting = Setting(device, 2, 4, kill_every_s=1.0)
    whole, parts = (simulate_cells(setting, workload, jobs).kills for jobs in (1, 2))
    assert whole >= 7
    assert abs(parts - whole) <= 2


def test_a_search_has_cells_too(monkeypatch):
    begun = []

    class Noted(InTurn):
        def wait(self) -> Any:
            begun.append(self)
            return super().wait()

    monkeypatch.setattr(cells, "_Cell", Noted)
    words = ("--mix", "uniform", "--requests", "20", "--profile", A100, "--find-rate", "--json")
    told = json.loads(run(*words, "--prefill", "2", "--decode", "2", "--jobs", "2"))
    assert len(begun) == 2 * len(told["tried"])


def test_a_cell_that_dies_says_so(device):
    workload = make_mix("uniform", 10.0, None, 1, requests=4)
    cell = cells._Cell()
    cell._process.kill()
    cell.begin(Setting(device), WorkloadParcel.of(workload))
    with pytest.raises(SimulationError, match="ended with status -9"):
        cell.wait()
    cell.end()


@pytest.mark.slow
def test_cells_are_processes_of_their_own(device):
    check_cells(device)


def test_a_profile_file_is_read(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(Path(f"cluster/capacity/profiles/{A100}.json").read_text())
    assert read_profile(str(file)).name == read_profile(A100).name
