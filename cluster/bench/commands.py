"""`kvrelay bench`: registered by cluster/cli.py. Loads torch only when something is measured."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cluster.bench.machine import cores_usable
from cluster.bench.report import BenchError, Report
from cluster.bench.text import TEXT, read_text
from cluster.model_store import BUILT_IN, ModelError, PreparedModel, prepare
from cluster.preparation import Progress
from cluster.progress import console, errors_in_one_line, reporting, result_console
from kvrelay.config import KvDtype, Quantize

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "transformers"


@click.group()
def bench() -> None:
    """Measure kvrelay on this machine."""


def _engine_options(quantize: Quantize) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that all benches of an engine have, with the default of `--quantize`."""
    options = (
        click.option(
            "--threads",
            type=click.IntRange(0, 1024),
            default=0,
            help="0 takes all cores that this process may use.",
        ),
        click.option("--quantize", type=click.Choice(get_args(Quantize)), default=quantize),
        click.option("--kv-dtype", type=click.Choice(get_args(KvDtype)), default="auto"),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@bench.command()
@click.argument("model")
@_engine_options("none")
@click.option(
    "--compare",
    type=click.Choice([BASELINE, "none"]),
    default=BASELINE,
    help="What is measured in turns with it.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(16, 1 << 20),
    default=256,
    help="Prompt tokens a prefill step.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it, into a .png file."
)
@click.option("--quick", is_flag=True, help="A few rows, and less time for each.")
@click.option("--profile", is_flag=True, help="Also show where the time of one step goes.")
def engine(
    model: str,
    *,
    compare: str,
    chunk_tokens: int,
    plot: Path | None,
    quick: bool,
    profile: bool,
    as_json: bool,
    **choice: Any,
) -> None:
    """Measure prefill and decode of MODEL, as in `kvrelay serve`.

    Each row stands beside transformers (float32, as many threads, measured in turns with ours) and
    beside what the machine allows: its fastest fp32 matrix product and memory read of this run.
    """
    with errors_in_one_line(ModelError, BenchError):
        if plot:
            from cluster.bench.plot import check_plot, draw

            check_plot(plot)
        with _measuring(model, choice) as (prepared, on_progress):
            from cluster.bench.engine import EngineBench, bench_engine
            from cluster.bench.loading import EngineChoice

            asked = EngineBench(
                EngineChoice(**choice),
                compare == BASELINE,
                chunk_tokens,
                quick=quick,
                profile=profile,
            )
            report = bench_engine(prepared, asked, on_progress)
        show(report, as_json, lambda: report.table(BASELINE))
        if plot:
            draw(report, plot, BASELINE)
            console.print(f"plot: {plot}")


@bench.command()
@click.argument("model")
@_engine_options("int8")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A UTF-8 file; without it, the text that comes with kvrelay.",
)
def perplexity(model: str, *, text: Path | None, as_json: bool, **choice: Any) -> None:
    """Measure what a quantization costs MODEL in quality: its perplexity over a text.

    Beside transformers and our own fp32, in the same run.
    """
    with errors_in_one_line(ModelError, BenchError):
        content = read_text(text or TEXT)
        with _measuring(model, choice) as (prepared, on_progress):
            from cluster.bench.loading import EngineChoice
            from cluster.bench.perplexity import bench_perplexity, comparison_table

            report = bench_perplexity(prepared, content, EngineChoice(**choice), on_progress)
        show(report, as_json, lambda: comparison_table(report))


@bench.command()
@click.option(
    "--size",
    "sizes_mb",
    type=click.IntRange(1, 4096),
    multiple=True,
    default=(1, 16, 47, 256),
    show_default=True,
    help="MB of one hand-off; may be given several times.",
)
@click.option("--model", default=BUILT_IN, show_default=True, help="'none' measures links alone.")
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="none")
@click.option("--quick", is_flag=True, help="Less time for each row.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def transport(
    sizes_mb: tuple[int, ...], model: str, quantize: Quantize, *, quick: bool, as_json: bool
) -> None:
    """Measure the KV links between two processes, and what a hand-off costs a request.

    Each link stands beside gloo, and beside what the machine allows: a copy into shared memory, a
    loop over a plain TCP socket; all in turns, in the same run.
    """
    with (
        errors_in_one_line(ModelError, BenchError),
        contextlib.redirect_stdout(sys.stderr),
        reporting() as on_progress,
    ):
        prepared = None if model == "none" else prepare(model, on_progress=on_progress)
        from cluster.bench.transport import TransportBench, bench_transport

        asked = TransportBench(sizes_mb, prepared, quantize, quick)
        report = bench_transport(asked, on_progress)
    show(report, as_json, lambda: report.table("gloo"))


@bench.command()
@click.argument("model", default=BUILT_IN)
@click.option("--requests", type=click.IntRange(2, 100_000), help="100; 20 with --quick.")
@click.option(
    "--clients",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    help="Requests at a time: each client asks again as soon as it has its answer.",
)
@click.option(
    "--system-tokens",
    type=click.IntRange(16, 1 << 20),
    default=1500,
    show_default=True,
    help="Tokens that all prompts begin with.",
)
@click.option("--prefill", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--decode", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="none")
@click.option("--quick", is_flag=True, help="Fewer requests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def prefix(model: str, *, requests: int | None, quick: bool, as_json: bool, **choice: Any) -> None:
    """Measure what caching saves when all prompts to MODEL begin alike.

    Two clusters get the same requests: one as in `kvrelay serve`, one that caches nothing and
    places at random.
    """
    with (
        errors_in_one_line(ModelError, BenchError),
        contextlib.redirect_stdout(sys.stderr),
        reporting() as on_progress,
    ):
        prepared = prepare(model, on_progress=on_progress)
        from cluster.bench.prefix import BASELINE as NO_CACHE
        from cluster.bench.prefix import PrefixBench, bench_prefix

        asked = PrefixBench(requests=requests or (20 if quick else 100), **choice)
        report = bench_prefix(prepared, asked, on_progress)
    show(report, as_json, lambda: report.table(NO_CACHE))


@bench.command()
@click.option("--quick", is_flag=True, help="Less time for each row.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def placement(*, quick: bool, as_json: bool) -> None:
    """Measure what choosing the workers of one request costs the router, as its fleet grows."""
    with contextlib.redirect_stdout(sys.stderr), reporting() as on_progress:
        from cluster.bench.placement import PlacementBench, bench_placement

        report = bench_placement(PlacementBench(quick=quick), on_progress)
    show(report, as_json, lambda: report.table("smallest"))


@bench.command()
@click.option("--quick", is_flag=True, help="Fewer rows, and less time for each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def router(*, quick: bool, as_json: bool) -> None:
    """Measure the router, with stand-in workers that compute nothing.

    What it adds to the first token, the tokens it streams, the memory of a stream that waits, the
    time to refuse. Beside a bare gRPC server, in turns, in the same run.
    """
    with errors_in_one_line(BenchError), reporting() as on_progress:
        from cluster.bench.router import BASELINE as BARE
        from cluster.bench.router import RouterBench, bench_router

        report = bench_router(RouterBench.of(quick=quick), on_progress)
    show(report, as_json, lambda: report.table(BARE))


@contextlib.contextmanager
def _measuring(model: str, choice: dict[str, Any]) -> Iterator[tuple[PreparedModel, Progress]]:
    """The model, ready to load. Within, torch has the threads chosen, and whatever a library prints
    goes to stderr: stdout is for the result."""
    choice["threads"] = choice["threads"] or cores_usable()
    with contextlib.redirect_stdout(sys.stderr), reporting() as report:
        prepared = prepare(model, on_progress=report)
        import torch

        torch.set_num_threads(choice["threads"])
        yield prepared, report


def show(report: Report, as_json: bool, table: "Callable[[], Table]") -> None:
    """On stdout: one JSON object, or the machine, the table and the notes."""
    if as_json:
        print(report.to_json())
        for note in report.notes:
            console.print(note, markup=False)
        return
    out = result_console()
    out.print(report.heading(), soft_wrap=True)
    out.print(table())
    for note in report.notes:
        out.print(note)
