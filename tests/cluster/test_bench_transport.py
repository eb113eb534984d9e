"""`kvrelay bench transport`, links alone: real processes, real sockets, little time."""

import json

from click.testing import CliRunner

from cluster.cli import main


def test_each_link_stands_beside_gloo_and_its_limit():
    arguments = ["bench", "transport", "--size", "1", "--model", "none", "--quick", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    links = {"shm/1", "shm/unchecked/1", "tcp/1", "tcp/unchecked/1"}
    assert links | {"memcpy/1", "socket/1", "gloo/1"} <= set(rows)
    for name in links:
        assert rows[name]["unit"] == "GB/s"
        assert rows[name]["ratio"] > 0
        assert rows[name]["limit_ratio"] > 0
    assert rows["shm/1/p99"]["value"] >= rows["shm/1/p50"]["value"] > 0


def test_a_size_that_is_no_size_is_refused():
    result = CliRunner().invoke(main, ["bench", "transport", "--size", "0"])
    assert result.exit_code == 2
    assert "--size" in result.output
