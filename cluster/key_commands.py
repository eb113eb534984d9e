"""`kvrelay keys`: owns how a person makes API keys. Registered by cluster/cli.py."""

import os
from pathlib import Path

import click

from cluster.progress import errors_in_one_line
from router.keys import KeysError, KeySet, new_key


@click.group()
def keys() -> None:
    """API keys, for `kvrelay serve --api-keys FILE`."""


@keys.command()
@click.argument("name")
@click.option("--tenant", help="Keys of one tenant share cached prompts; NAME unless given.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append the entry to this file, which is made if there is none.",
)
def new(name: str, tenant: str | None, file: Path | None) -> None:
    """Make a key for NAME. It is printed this once; files only ever hold its hash."""
    with errors_in_one_line(KeysError):
        key, entry = new_key(name, tenant)
        if file is not None:
            _append(file, entry, name)
    click.echo(key)
    if file is None:
        click.echo(f"\n# For the file of --api-keys:\n{entry}", nl=False, err=True)


def _append(file: Path, entry: str, name: str) -> None:
    """Replaces the file by a longer one: whoever reads it meanwhile sees no half of an entry."""
    known = KeySet.load(file) if file.exists() else KeySet(())
    if any(key.name == name for key in known):
        raise KeysError(f"{file} has a key {name!r} already: remove its entry, or choose a name")
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        partial.touch(mode)
        gap = "\n" if before.endswith("\n") or not before else "\n\n"
        partial.write_text(before + gap * bool(before) + entry, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise KeysError(f"cannot write {file}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
