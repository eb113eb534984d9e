"""`kvrelay chaos`: registered by cluster/cli.py. Loads gRPC, Ray and torch only when it runs."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click

from cluster.bench.commands import show
from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.chaos.faults import KINDS
from cluster.chaos.model import TINY, tiny_model
from cluster.model_store import ModelError, PreparedModel, prepare
from cluster.preparation import Progress
from cluster.progress import console, errors_in_one_line, reporting
from kvrelay.config import Transport

_RATE, _SOAK_RATE = 4.0, 20.0
_ASKS = 64


@click.command()
@click.argument("model", default=TINY)
@click.option("--minutes", type=click.FloatRange(0.05, 10_000), help="10; 20 with --soak.")
@click.option(
    "--kill-every",
    "kill_every_s",
    type=click.FloatRange(0, 3600),
    help="Seconds from one fault to the next, a quarter more or less; 0: none. 20; 0 with --soak.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="The same requests and faults.")
@click.option("--prefill", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--decode", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--routers", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--transport", type=click.Choice(get_args(Transport)), default="auto")
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 1000),
    help=f"Requests a second: {_RATE:g}; {_SOAK_RATE:g} with --soak.",
)
@click.option(
    "--fault",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    help="Only this kind; may be given several times. All, unless there is but one router.",
)
@click.option("--soak", is_flag=True, help="Many short requests; measures growth of memory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with plots, into a .html file.",
)
def chaos(*, as_json: bool, page: Path | None, **choice: Any) -> None:
    """Serve MODEL to clients of our own while its processes are killed and stopped.

    Every answer is compared, token by token, with what was answered before the first fault. Ends
    with status 1 when anything was lost, wrong, repeated or leaked, when a goal is missed, or when
    too little was asked or struck to show anything. Without MODEL a tiny one with
    random weights is served, made on the spot.
    """
    with errors_in_one_line(ModelError, BenchError), _terminated_like_ctrl_c():
        if page:
            check_plot(page, option="--report", suffix=".html")
        with contextlib.redirect_stdout(sys.stderr), reporting() as on_progress:
            prepared = _prepared(choice["model"], on_progress)
            from cluster.chaos.run import Chaos, run_chaos
            from cluster.options import LOG_FORMAT

            # That workers die is no news here.
            logging.basicConfig(level="CRITICAL", format=LOG_FORMAT)
            asked = Chaos(**_completed(choice))
            outcome = run_chaos(prepared, asked, on_progress)
        report = outcome.report()
        if as_json:
            print(outcome.to_json())
            for note in report.notes:
                console.print(note, markup=False)
        else:
            show(report, as_json=False, table=lambda: report.table(""))
        if page:
            from cluster.chaos.page import write_page

            write_page(outcome, page)
            console.print(f"report: {page}", markup=False)
        if not outcome.passed:
            print(f"failed; play it again: {asked.play_again}", file=sys.stderr)
            sys.exit(1)


def _prepared(model: str, on_progress: Progress) -> PreparedModel:
    return tiny_model(on_progress) if model == TINY else prepare(model, on_progress=on_progress)


def _completed(choice: dict[str, Any]) -> dict[str, Any]:
    """With what depends on other options."""
    soak = choice["soak"]
    defaults = {
        "minutes": 20.0 if soak else 10.0,
        "kill_every_s": 0.0 if soak else 20.0,
        "rate": _SOAK_RATE if soak else _RATE,
    }
    unset = {name: value for name, value in defaults.items() if choice[name] is None}
    survivable = [kind for kind in KINDS if choice["routers"] > 1 or not kind.endswith("router")]
    minutes = unset.get("minutes", choice["minutes"])
    asks = _ASKS if minutes >= 1 else _ASKS // 4  # their right answers take their time, too
    return {**choice, **unset, "asks": asks, "kinds": choice["kinds"] or tuple(survivable)}


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM leaves no process behind either."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
