"""`kvrelay bench serve`: registered by cluster/cli.py. Loads gRPC only when it runs."""

import sys
from pathlib import Path
from typing import Any

import click

from cluster.bench.commands import bench
from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.load.plan import TIMEOUT_S, LoadError, Plan, Target
from cluster.load.result import LoadResult
from cluster.progress import console, errors_in_one_line, reporting, result_console
from cluster.workload.asks import WorkloadError
from cluster.workload.figures import Figures
from cluster.workload.options import UNIFORM, chosen_workload, workload_options
from cluster.workload.slo import Slo

_EXIT_STOPPED = 130


@bench.command()
@click.argument("url")
@workload_options
@click.option("--model", default="", help="Where the server has several.")
@click.option(
    "--api-key",
    envvar="KVRELAY_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="For a server that asks for one; others can see what is on a command line.",
)
@click.option(
    "--certificates",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    envvar="KVRELAY_CERTIFICATES",
    show_envvar=True,
    help="Folder with ca.pem, and cert.pem and key.pem if the server asks for them.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1),
    default=TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="Of one answer; then it has failed.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with plots, into a .html file.",
)
def serve(url: str, *, as_json: bool, page: Path | None, **choice: Any) -> None:
    """Measure the server at URL under load, as its clients see it.

    URL is http(s)://HOST[:PORT] of any server with OpenAI's API, or grpc://HOST:PORT of kvrelay's
    own, which also tells the times of its phases. Asks for --mix uniform unless told what. Every
    request is sent when it is due, whatever runs (open loop); TTFT counts from then. Ctrl-C shows
    what was measured until then.
    """
    with errors_in_one_line(WorkloadError, LoadError, BenchError):
        if page:
            check_plot(page, option="--report", suffix=".html")
        slo = Slo(choice["ttft_ms"], choice["tpot_ms"])
        if choice["trace"] is None and choice["mix"] is None:
            choice["mix"] = UNIFORM
        workload = chosen_workload(choice)
        target = Target(
            url=url,
            model=choice["model"],
            api_key=choice["api_key"],
            certificates=str(choice["certificates"] or ""),
            timeout_s=choice["timeout_s"],
        )
        from cluster.load.run import run_load

        with reporting() as on_progress:
            result = run_load(Plan.of(target, workload, choice["seed"]), on_progress)
        found = result.figures(slo)
        _show(result, found, as_json)
        if page:
            from cluster.load.page import write_load_page

            write_load_page(result, found, page)
            console.print(f"report: {page}", markup=False)
        if result.stopped:
            sys.exit(_EXIT_STOPPED)


def _show(result: LoadResult, found: Figures, as_json: bool) -> None:
    """On stdout: one JSON object, or the tables. Warnings are on stderr as well."""
    from cluster.load.table import heading, time_table, value_table

    if as_json:
        print(result.to_json(found.slo))
    else:
        out = result_console()
        out.print(heading(result), soft_wrap=True)
        out.print(time_table(found))
        out.print(value_table(found))
        for note in result.notes(found):
            out.print(note, soft_wrap=True)
    for warning in result.warnings(found):
        console.print(f"WARNING {warning}", markup=False, soft_wrap=True)
