"""`kvrelay bench goodput`: registered by cluster/cli.py."""

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any, get_args

import click

from cluster.bench.commands import bench
from cluster.bench.goodput.scale import TPOT_SCALE, TTFT_SCALE
from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError, Report
from cluster.model_store import BUILT_IN, ModelError, prepare
from cluster.progress import console, errors_in_one_line, reporting, result_console
from cluster.workload.mixes import UNIFORM_ANSWER, UNIFORM_PROMPT, Range
from cluster.workload.slo import Slo
from kvrelay.config import Quantize

_REQUESTS, _REQUESTS_QUICK = 120, 40
_QUICK_SCALE = (2.0, 10.0)
_SLO = (Slo(2000.0, 150.0),)


class _Scale(click.ParamType[tuple[float, ...]]):
    name = "A,B,..."

    def convert(self, value: Any, param: Any, context: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        if value == "none":
            return ()
        try:
            scale = tuple(float(part) for part in value.split(","))
        except ValueError:
            scale = ()
        if not scale or not all(math.isfinite(one) and one > 0 for one in scale):
            self.fail(f"{value!r} is no list of numbers above 0, like 1.5,2,5", param, context)
        return scale


class _Tokens(click.ParamType[Range]):
    name = "A:B"

    def convert(self, value: Any, param: Any, context: Any) -> Range:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is not of the form A:B, tokens from A to B", param, context)
        return int(found[1]), int(found[2])


class _SloType(click.ParamType[Slo]):
    name = "TTFT_MS:TPOT_MS"

    def convert(self, value: Any, param: Any, context: Any) -> Slo:
        if isinstance(value, Slo):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?):(\d{1,9}(?:\.\d+)?)", value)
        if not found or not float(found[1]) or not float(found[2]):
            self.fail(f"{value!r} is not of the form TTFT_MS:TPOT_MS, both above 0", param, context)
        return Slo(float(found[1]), float(found[2]))


@bench.command()
@click.argument("model", default=BUILT_IN)
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="int8")
@click.option(
    "--prompt", type=_Tokens(), default=UNIFORM_PROMPT, help="Tokens of prompts. [64:512]"
)
@click.option("--answer", type=_Tokens(), default=UNIFORM_ANSWER, help="Tokens of answers. [16:64]")
@click.option(
    "--tpot-scale",
    type=_Scale(),
    help="SLOs for TPOT, in unloaded steps, with TTFT at 10x; none: not this curve."
    " [1.5,2,2.5,3,5,10,20]",
)
@click.option(
    "--ttft-scale",
    type=_Scale(),
    help="SLOs for TTFT, in unloaded prefills, with TPOT at 5x; none: not this curve. [2,5,20]",
)
@click.option(
    "--slo",
    "slos",
    type=_SloType(),
    multiple=True,
    help="One more SLO, in milliseconds; may be given several times. [2000:150]",
)
@click.option("--requests", type=click.IntRange(10, 100_000), help="Of each run. [120]")
@click.option(
    "--runs-max",
    type=click.IntRange(2, 20),
    help="Rates that are tried for one arrangement and SLO, at most. [6]",
)
@click.option("--quick", is_flag=True, help="Two SLOs, and shorter runs: a first look.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with plots, into a .html file.",
)
def goodput(
    model: str,
    *,
    tpot_scale: tuple[float, ...] | None,
    ttft_scale: tuple[float, ...] | None,
    slos: tuple[Slo, ...],
    requests: int | None,
    runs_max: int | None,
    quick: bool,
    as_json: bool,
    page: Path | None,
    **choice: Any,
) -> None:
    """Find the highest rate at which 90 % of requests to MODEL meet their SLO.

    For a worker that does both phases, for a prefill and a decode worker, and for the two with
    prompts wherever the SLO is met, in turn on the same cores, along a scale of SLOs. Takes an hour
    and a half with the built-in model on two cores, 5 minutes with --quick.
    """
    with errors_in_one_line(ModelError, BenchError):
        if page:
            check_plot(page, option="--report", suffix=".html")
        with contextlib.redirect_stdout(sys.stderr), reporting() as on_progress:
            prepared = prepare(model, on_progress=on_progress)
            from cluster.bench.goodput.run import GoodputBench, bench_goodput

            usual = _QUICK_SCALE if quick else TPOT_SCALE
            asked = GoodputBench(
                tpot_scale=usual if tpot_scale is None else tpot_scale,
                ttft_scale=(() if quick else TTFT_SCALE) if ttft_scale is None else ttft_scale,
                fixed=slos or (() if quick else _SLO),
                requests=requests or (_REQUESTS_QUICK if quick else _REQUESTS),
                runs_max=runs_max or (3 if quick else 6),
                precision=0.1 if quick else 0.05,
                **choice,
            )
            found = bench_goodput(prepared, asked, on_progress)
        if page:
            from cluster.bench.goodput.page import write_goodput_page

            write_goodput_page(found, page)
            console.print(f"page: {page}")
        if as_json:
            print(found.to_json())
            return
        out = result_console()
        out.print(Report(found.machine, ()).heading(), soft_wrap=True)
        out.print(found.table())
        for note in found.notes:
            out.print(note)
