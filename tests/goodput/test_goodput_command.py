"""`kvrelay bench goodput`: what it takes; slowly, the whole command with a tiny model."""

import json

import pytest
from click.testing import CliRunner
from tiny_models import make_endless

from cluster.cli import main


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tpot-scale", "1,x"),
        ("--tpot-scale", "0,1"),
        ("--ttft-scale", "inf"),
        ("--slo", "2000"),
        ("--slo", "0:150"),
        ("--prompt", "0:5"),
        ("--answer", "9:5"),
    ],
)
def test_what_makes_no_sense_is_refused(option, value):
    result = CliRunner().invoke(main, ["bench", "goodput", option, value])
    assert result.exit_code == 2
    assert option in result.output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_command(tmp_path):
    pytest.importorskip("matplotlib")
    model, page = make_endless(tmp_path / "model"), tmp_path / "page.html"
    sizes = ["--prompt", "16:64", "--answer", "4:8", "--requests", "10", "--runs-max", "2"]
    what = ["--quantize", "none", "--tpot-scale", "20", "--quick", "--json", "--report", str(page)]
    result = CliRunner().invoke(main, ["bench", "goodput", str(model), *sizes, *what])
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.stdout)["points"]
    assert set(point["arrangements"]) == {"colocated", "disaggregated", "adaptive"}
    for cell in point["arrangements"].values():
        assert 1 <= len(cell["tried"]) <= 2
        assert all(tried["failed"] == 0 for tried in cell["tried"])
    assert "<svg" in page.read_text()
