"""`kvrelay bench all`: registered by cluster/cli.py. `make bench` runs it."""

import sys
from pathlib import Path

import click

from cluster.bench.commands import bench
from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.bench.suite.parts import all_parts, chosen
from cluster.model_store import BUILT_IN, ModelError, prepare
from cluster.progress import console, errors_in_one_line, reporting

_PAGE = "bench.html"
_NAMES = tuple(part.name for part in all_parts(BUILT_IN, Path()))


@bench.command("all")
@click.argument("model", default=BUILT_IN)
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    help="A folder, made if need be, for a JSON file of each part and the page of all. [results]",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(_NAMES),
    help="This part; may be repeated.",
)
def every(model: str, *, folder: Path, only: tuple[str, ...]) -> None:
    """Run every benchmark in its short form, one after another, and write one page of them.

    Some quarter of an hour with the built-in model on two cores, which should have nothing else
    to do. Ends with status 1 when a part has failed.
    """
    with errors_in_one_line(ModelError, BenchError, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _PAGE
        check_plot(file, option="--out", suffix=".html")
        with reporting() as on_progress:
            prepared = prepare(model, on_progress=on_progress)
            from cluster.bench.suite.page import write_suite_page
            from cluster.bench.suite.run import run_parts

            parts = chosen(all_parts(model, folder), only)
            ran = run_parts(parts, prepared, folder, on_progress)
        write_suite_page(ran, folder, file)
        console.print(f"page: {file}", markup=False)
        for one in ran:
            if one.error:
                print(f"error: {one.part.name}: {one.error}", file=sys.stderr)
        if any(one.error for one in ran):
            sys.exit(1)
