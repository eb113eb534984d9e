"""`kvrelay keys new`: what is printed, and what a file holds afterwards."""

import pytest
from click.testing import CliRunner

from cluster.key_commands import keys
from router.keys import KeySet


def new(*arguments: str):
    return CliRunner().invoke(keys, ["new", *arguments])


def test_prints_the_key_alone_on_stdout_and_the_entry_beside_it(tmp_path):
    result = new("alice", "--tenant", "team")
    assert result.exit_code == 0
    file = tmp_path / "keys.toml"
    file.write_text(result.stderr)
    found = KeySet.load(file).find(result.stdout.strip())
    assert (found.name, found.tenant) == ("alice", "team")


def test_appends_to_a_file_that_only_its_owner_can_read(tmp_path):
    file = tmp_path / "keys.toml"
    one = new("alice", "--file", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("# ours\n" + file.read_text() + "requests_at_once = 2")
    other = new("bob", "--file", str(file))
    keyset = KeySet.load(file)
    assert keyset.find(one.stdout.strip()).quota.requests_at_once == 2
    assert keyset.find(other.stdout.strip()).name == "bob"
    assert file.read_text().startswith("# ours\n")
    assert [path.name for path in tmp_path.iterdir()] == ["keys.toml"]


@pytest.mark.parametrize(
    ("before", "name", "why"),
    [
        ("", "a b", "name"),
        ("[[keys", "alice", "keys.toml"),
        ('[[keys]]\nname = "alice"\nid = "01234567"\nhash = "sha256:%s"\n' % ("0" * 64), "alice",
         "already"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_the_file(tmp_path, before, name, why):
    file = tmp_path / "keys.toml"
    file.write_text(before)
    result = new(name, "--file", str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert why in result.stderr
    assert file.read_text() == before
