"""How docs/LIFECYCLES.md is drawn: docs/lifecycles.py, on a table of the test's own."""

import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("lifecycles", ROOT / "docs" / "lifecycles.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lifecycles"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lifecycles"]


class Light(Enum):
    OFF = "off"
    ON = "on"  # shines,
    # and costs money
    NOT_THERE = "not there"


class Hand(Enum):
    PRESS = "press"
    HIT_HARD = "hit_hard"  # a # in a comment
    WAIT = "wait"


TABLE = {
    (Light.OFF, Hand.PRESS): Light.ON,
    (Light.OFF, Hand.HIT_HARD): Light.NOT_THERE,
    (Light.ON, Hand.HIT_HARD): Light.NOT_THERE,
    (Light.ON, Hand.PRESS): Light.OFF,
    (Light.ON, Hand.WAIT): Light.ON,
}


def test_arrows_are_the_rows_that_change_the_state(drawing):
    drawn = drawing.diagram(drawing.Lifecycle("Light", "here", {**TABLE}))
    assert drawn.splitlines()[1:-1] == [
        "stateDiagram-v2",
        "    [*] --> OFF",
        "    OFF : off",
        "    ON : on",
        "    NOT_THERE : not there",
        "    OFF --> ON : press",
        "    OFF --> NOT_THERE : hit hard",
        "    ON --> NOT_THERE : hit hard",
        "    ON --> OFF : press",
        "    NOT_THERE --> [*]",
    ]


def test_events_between_the_same_two_states_share_an_arrow(drawing):
    table = {**TABLE, (Light.OFF, Hand.WAIT): Light.NOT_THERE}
    drawn = drawing.diagram(drawing.Lifecycle("Light", "here", table))
    assert "    OFF --> NOT_THERE : hit hard, wait" in drawn.splitlines()


def test_every_cell_says_what_the_event_does_in_the_state(drawing):
    drawn = drawing.matrix(drawing.Lifecycle("Light", "here", TABLE))
    assert drawn.splitlines() == [
        "| event | off | on |",
        "| --- | --- | --- |",
        "| press | on | off |",
        "| hit hard | not there | not there |",
        "| wait | - | *stays* |",
    ]


def test_meanings_are_the_comments_beside_the_members(drawing):
    assert drawing.meanings(Light) == "- **on**: shines, and costs money\n"
    assert drawing.meanings(Hand) == "- **hit hard**: a # in a comment\n"


def test_a_page_that_differs_is_told(drawing, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "TARGET", tmp_path / "LIFECYCLES.md")
    assert drawing.main(["--check"]) == 1
    assert drawing.main([]) == 0
    assert drawing.main(["--check"]) == 0
    (tmp_path / "LIFECYCLES.md").write_text("something else")
    assert drawing.main(["--check"]) == 1
    assert "run `make docs`" in capsys.readouterr().err
