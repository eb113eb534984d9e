"""`kvrelay bench all`: which parts run, what becomes of one that fails, and the page of all."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.bench.suite import commands, page, run
from cluster.bench.suite.parts import DEVICE, Part, all_parts, chosen
from cluster.bench.suite.run import Ran, run_parts
from cluster.cli import main
from cluster.model_store import PreparedModel
from cluster.preparation import silent

MODEL = PreparedModel("tiny", Path("tiny"))
ROWS = {
    "machine": {"cpu": "a cpu", "threads": 1},
    "rows": [
        {
            "name": f"case/{ratio}",
            "value": 3.0,
            "unit": "ms",
            "baseline": 2.0,
            "ratio": ratio,
            "limit_ratio": None,
        }
        for ratio in (1.5, 0.5, None)
    ],
}
# Stands in for the command: does what its first word says.
STAND_IN = """
import json, sys, time
what, *rest = sys.argv[1:]
if what == "fail":
    sys.exit("some lines\\nerror: no model")
if what == "hang":
    time.sleep(600)
print(json.dumps({"asked": rest}))
"""


def part(name: str, *words: str, **more: Any) -> Part:
    return Part(name, words, f"about {name}", **{"limit_s": 60.0, **more})


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_KVRELAY", (sys.executable, "-c", STAND_IN))


def test_results_of_each_part_are_in_a_file_of_its_own(tmp_path: Path):
    parts = [part("one", "works", "--quick"), part("two", "works", paged=True)]
    assert [one.error for one in run_parts(parts, MODEL, tmp_path, silent)] == ["", ""]
    assert json.loads((tmp_path / "one.json").read_text())["asked"] == ["--quick", "--json"]
    asked = json.loads((tmp_path / "two.json").read_text())["asked"]
    assert asked == ["--json", "--report", str(tmp_path / "two.html")]


def test_a_part_that_fails_is_said_and_the_others_run(tmp_path: Path):
    (tmp_path / "bad.json").write_text("of an earlier run")
    parts = [part("bad", "fail"), part("good", "works")]
    ran = run_parts(parts, MODEL, tmp_path, silent)
    assert [one.error for one in ran] == ["no model", ""]
    assert not (tmp_path / "bad.json").exists()


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path):
    (ran,) = run_parts([part("slow", "hang", limit_s=0.5)], MODEL, tmp_path, silent)
    assert ran.error == "it had not ended after 0.5 s"


def test_a_part_without_what_it_wants_does_not_run(tmp_path: Path):
    asked = part("after", "hang", wants=("x.json",))
    (ran,) = run_parts([asked], MODEL, tmp_path, silent)
    assert "there is no x.json" in ran.error


def test_what_a_part_that_failed_made_earlier_is_gone(tmp_path: Path):
    (tmp_path / "x.json").write_text("of an earlier run")
    parts = [part("makes", "fail", makes=("x.json",)), part("after", "works", wants=("x.json",))]
    assert [one.error for one in run_parts(parts, MODEL, tmp_path, silent)] == [
        "no model",
        "there is no x.json, which another part makes",
    ]


def test_every_part_is_a_command_and_bounded(tmp_path: Path):
    parts = all_parts("smollm2", tmp_path)
    assert len({one.name for one in parts}) == len(parts)
    assert [one.name for one in parts if one.makes == (DEVICE,)] == ["profile"]
    for one in parts:
        command: Any = main
        words = one.command(tmp_path, "grpc://127.0.0.1:1")
        while words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        with command.make_context(one.name, words):
            assert one.limit_s <= 600


def test_some_can_be_chosen():
    parts = [part("one"), part("two")]
    assert chosen(parts, ()) == parts
    assert chosen(parts, ("two",)) == parts[1:]


def test_the_page_has_a_section_for_each_part(tmp_path: Path):
    table, own, failed = part("table", beside="theirs"), part("own", paged=True), part("failed")
    table.json(tmp_path).write_text(json.dumps(ROWS))
    own.page(tmp_path).write_text("<html><body>\n<h1>Its own</h1><p>x</p></body></html>")
    file = tmp_path / "bench.html"
    page.write_suite_page([Ran(table), Ran(own), Ran(failed, "no <model>")], tmp_path, file)
    text = file.read_text()
    assert text.count("<h1>") == 1
    assert "<h3>Its own</h3>" in text
    assert ">theirs</th>" in text
    assert "1.50x" in text
    assert "<svg" in text
    assert "No results: no &lt;model&gt;" in text


def test_the_command_writes_the_page_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = [part("bad", "fail")]
    monkeypatch.setattr(commands, "all_parts", lambda model, folder: parts)
    monkeypatch.setattr(commands, "prepare", lambda model, **_: MODEL)
    result = CliRunner().invoke(main, ["bench", "all", "tiny", "--out", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: bad: no model"
    assert "No results: no model" in (tmp_path / "new" / "bench.html").read_text()
