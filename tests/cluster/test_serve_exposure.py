"""`kvrelay serve` says no before it starts anything that strangers could reach."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import main
from router.keys import new_key


@pytest.fixture
def key_file(tmp_path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(new_key("alice")[1])
    return file


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--host", "0.0.0.0"], "strangers: add --certificates"),
        (["--host", "::"], "strangers: add --certificates"),
        (["--host", "0.0.0.0", "--api-keys"], "keys would travel in clear text"),
    ],
)
def test_serve_is_not_open_to_strangers(key_file, options, why):
    if options[-1] == "--api-keys":
        options = [*options, str(key_file)]
    result = CliRunner().invoke(main, ["serve", "no-model", *options])
    assert result.exit_code == 2
    assert why in result.stderr
    assert "--insecure" in result.stderr


def test_no_host_is_a_mistake():
    result = CliRunner().invoke(main, ["serve", "no-model", "--host", ""])
    assert result.exit_code == 2
    assert "--host: empty: say 127.0.0.1 for this machine alone" in result.stderr


@pytest.mark.parametrize("options", [[], ["--insecure", "--host", "0.0.0.0"]])
def test_serve_gets_as_far_as_the_model_otherwise(options, tmp_path):
    result = CliRunner().invoke(main, ["serve", str(tmp_path), *options])
    assert result.exit_code == 1
    assert str(tmp_path) in result.stderr


@pytest.mark.parametrize("text", ["[[keys", 'keys = "none"'])
def test_serve_refuses_a_broken_file_of_keys(text, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["serve", "no-model", "--api-keys", str(file)])
    assert result.exit_code == 2
    assert "--api-keys" in result.stderr
    assert "keys.toml" in result.stderr
