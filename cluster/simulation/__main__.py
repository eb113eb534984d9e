"""The command: plays seeds, and says which fail. Seeds of a range are shared out to processes."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import click

from cluster.simulation.world import Result, run

_SHOWN_LINES = 60


@click.command(help="Simulate clusters by seed. Without --seed, every seed of --seeds.")
@click.option("--seeds", default="0:100", show_default=True, help="A:B, from A to before B.")
@click.option("--seed", type=int, help="This one alone.")
@click.option("--trace", is_flag=True, help="With --seed: show all that happened.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(seeds: str, seed: int | None, trace: bool, jobs: int) -> None:
    if seed is not None:
        sys.exit(_one(seed, trace))
    first, last = _range(seeds)
    sys.exit(_shared_out(first, last, jobs) if jobs > 1 else _several(first, last))


def _one(seed: int, trace: bool) -> int:
    result = run(seed, whole_trace=trace)
    lines = result.trace if trace or result.violations else []
    for line in lines if trace else lines[-_SHOWN_LINES:]:
        click.echo(line)
    _say(result)
    return len(result.violations) > 0


def _several(first: int, last: int) -> int:
    failed, totals = 0, {name: Counter[str]() for name in ("outcomes", "faults")}
    began_s, began_cpu_s, entries = time.monotonic(), time.process_time(), 0
    for seed in range(first, last):
        result = run(seed)
        entries += result.entries
        for name, total in totals.items():
            total.update(getattr(result, name))
        if result.violations:
            failed += 1
            _say(result)
    for name, total in totals.items():
        click.echo(f"{name}: " + ", ".join(f"{k} {n}" for k, n in sorted(total.items())))
    took_s = time.monotonic() - began_s
    cpu_s = time.process_time() - began_cpu_s
    click.echo(
        f"seeds {first} to {last}: {failed} failed, {entries} events, {took_s:.1f} s, "
        f"{cpu_s:.1f} s of a core"
    )
    return failed > 0


def _say(result: Result) -> None:
    click.echo(f"seed {result.seed}: {result.hash}, {result.virtual_s:.3f} s of virtual time")
    for what in result.violations:
        click.echo(f"  VIOLATION {what}")
    if result.violations:
        click.echo(f"  again: python -m cluster.simulation --seed {result.seed} --trace")


def _shared_out(first: int, last: int, jobs: int) -> int:
    """A part of the range for each process."""
    bounds = [first + (last - first) * part // jobs for part in range(jobs + 1)]
    command = [sys.executable, "-m", "cluster.simulation", "--jobs", "1", "--seeds"]
    parts: list[Any] = [
        subprocess.Popen([*command, f"{begin}:{end}"])
        for begin, end in itertools.pairwise(bounds)
        if end > begin
    ]
    statuses = [part.wait() for part in parts]
    return int(any(statuses))  # of one that a signal has ended it is negative


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal():
        raise click.BadParameter(f"--seeds is two numbers A:B, not {text!r}")
    return int(first), int(last)


if __name__ == "__main__":
    main()
