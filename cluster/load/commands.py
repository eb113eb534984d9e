"""`kvrelay bench serve`: registered by cluster/cli.py. Loads gRPC only when it runs."""

import re
import sys
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from cluster.bench.commands import bench
from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.load.plan import TIMEOUT_S, LoadError, Plan, Target
from cluster.load.result import LoadResult
from cluster.progress import console, errors_in_one_line, reporting
from cluster.workload.arrivals import Arrivals
from cluster.workload.asks import Workload, WorkloadError
from cluster.workload.figures import Figures
from cluster.workload.mixes import MIXES, UNIFORM_ANSWER, UNIFORM_PROMPT, Range, make_mix
from cluster.workload.slo import Slo
from cluster.workload.traces import read_trace, scaled

_MIX, _RATE, _SECONDS = "uniform", 1.0, 60.0
_EXIT_STOPPED = 130
_PIPE_COLUMNS = 200  # no figure is cut short in a file


def _range(context: click.Context, param: click.Parameter, value: str | None) -> Range | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", value)
    if not found:
        raise click.BadParameter(f"{value!r} is not of the form A:B, tokens from A to B")
    return int(found[1]), int(found[2] or found[1])


@bench.command()
@click.argument("url")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Requests and their times from a file: an Azure trace (CSV) or Mooncake's (JSON lines).",
)
@click.option("--mix", type=click.Choice(MIXES), help=f"Requests drawn from --seed. [{_MIX}]")
@click.option(
    "--rate",
    type=float,
    help=f"Requests a second on the mean. [{_RATE:g}; of a trace, its own]",
)
@click.option("--seconds", type=float, help=f"Asks for so long. [{_SECONDS:g}; a trace: all of it]")
@click.option("--requests", type=click.IntRange(1), help="Asks at most so many.")
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), help="Of a mix. [poisson]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--rate-scale", type=float, help="A trace's own rate, times this.")
@click.option(
    "--length-scale", type=float, default=1.0, help="Lengths of prompts and answers, times this."
)
@click.option("--prompt", callback=_range, metavar="A:B", help="Tokens, of mix uniform. [64:512]")
@click.option("--answer", callback=_range, metavar="A:B", help="Tokens, of mix uniform. [16:64]")
@click.option("--ttft-ms", type=float, default=2000.0, show_default=True, help="SLO.")
@click.option("--tpot-ms", type=float, default=150.0, show_default=True, help="SLO.")
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
    own, which also tells the times of its phases. Every request is sent when it is due, whatever
    runs (open loop); TTFT counts from then. Ctrl-C shows what was measured until then.
    """
    with errors_in_one_line(WorkloadError, LoadError, BenchError):
        if page:
            check_plot(page, option="--report", suffix=".html")
        slo = Slo(choice["ttft_ms"], choice["tpot_ms"])
        workload = _workload(choice)
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


def _workload(choice: dict[str, Any]) -> Workload:
    trace, mix = choice["trace"], choice["mix"]
    if trace and mix:
        raise LoadError("--trace and --mix: take one of them")
    if trace:
        _only(choice, "of a mix", ("arrivals", "prompt", "answer"))
        if choice["rate"] is not None and choice["rate_scale"] is not None:
            raise LoadError("--rate and --rate-scale: take one of them")
        return scaled(
            read_trace(trace),
            rate=1.0 if choice["rate_scale"] is None else choice["rate_scale"],
            requests_per_s=choice["rate"],
            length=choice["length_scale"],
            requests=choice["requests"],
            seconds=choice["seconds"],
        )
    _only(choice, "of a --trace", ("rate_scale",))
    mix = mix or _MIX
    if mix != _MIX:
        _only(choice, f"of --mix {_MIX}", ("prompt", "answer"))
    seconds = choice["seconds"]
    if seconds is None and choice["requests"] is None:
        seconds = _SECONDS
    drawn = make_mix(
        mix,
        _RATE if choice["rate"] is None else choice["rate"],
        seconds,
        choice["seed"],
        choice["arrivals"] or "poisson",
        requests=choice["requests"],
        prompt=choice["prompt"] or UNIFORM_PROMPT,
        answer=choice["answer"] or UNIFORM_ANSWER,
    )
    return scaled(drawn, length=choice["length_scale"])


def _only(choice: dict[str, Any], whose: str, names: tuple[str, ...]) -> None:
    for name in names:
        if choice[name] is not None:
            raise LoadError(f"--{name.replace('_', '-')} is {whose}: drop it")


def _show(result: LoadResult, found: Figures, as_json: bool) -> None:
    """On stdout: one JSON object, or the tables. Warnings are on stderr as well."""
    from cluster.load.table import heading, time_table, value_table

    if as_json:
        print(result.to_json(found.slo))
    else:
        out = Console(highlight=False, markup=False)
        if not out.is_terminal:
            out.width = _PIPE_COLUMNS
        out.print(heading(result), soft_wrap=True)
        out.print(time_table(found))
        out.print(value_table(found))
        for note in result.notes(found):
            out.print(note, soft_wrap=True)
    for warning in result.warnings(found):
        console.print(f"WARNING {warning}", markup=False, soft_wrap=True)
