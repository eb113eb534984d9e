"""What a command line says of a workload: the options, and the requests that they choose.

Used by `kvrelay bench serve` and `kvrelay simulate`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from cluster.workload.arrivals import Arrivals
from cluster.workload.asks import Workload, WorkloadError
from cluster.workload.mixes import MIXES, UNIFORM_ANSWER, UNIFORM_PROMPT, Range, make_mix
from cluster.workload.traces import read_trace, scaled

UNIFORM = "uniform"
_RATE, _SECONDS = 1.0, 60.0

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _range(context: click.Context, param: click.Parameter, value: str | None) -> Range | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", value)
    if not found:
        raise click.BadParameter(f"{value!r} is not of the form A:B, tokens from A to B")
    return int(found[1]), int(found[2] or found[1])


_OPTIONS = (
    click.option(
        "--trace",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Requests and their times from a file: an Azure trace (CSV) or Mooncake's"
        " (JSON lines).",
    ),
    click.option("--mix", type=click.Choice(MIXES), help="Requests drawn from --seed."),
    click.option(
        "--rate",
        type=float,
        help=f"Requests a second on the mean. [{_RATE:g}; of a trace, its own]",
    ),
    click.option("--rate-scale", type=float, help="A trace's own rate, times this."),
    click.option(
        "--length-scale",
        type=float,
        default=1.0,
        help="Lengths of prompts and answers, times this.",
    ),
    click.option("--requests", type=click.IntRange(1), help="At most so many."),
    click.option("--seconds", type=float, help=f"For so long. [{_SECONDS:g}; a trace: all of it]"),
    click.option("--arrivals", type=click.Choice(get_args(Arrivals)), help="Of a mix. [poisson]"),
    click.option(
        "--prompt", callback=_range, metavar="A:B", help="Tokens, of mix uniform. [64:512]"
    ),
    click.option(
        "--answer", callback=_range, metavar="A:B", help="Tokens, of mix uniform. [16:64]"
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--ttft-ms", type=float, default=2000.0, show_default=True, help="SLO."),
    click.option("--tpot-ms", type=float, default=150.0, show_default=True, help="SLO."),
)


def workload_options(command: _Command) -> _Command:
    """Adds them, and the SLO, to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_workload(choice: Mapping[str, Any]) -> Workload:
    """choice: by the names of the options, as click has them. Raises WorkloadError."""
    trace, mix = choice["trace"], choice["mix"]
    if (trace is None) == (mix is None):
        raise WorkloadError(f"what is asked? --trace FILE or --mix {'|'.join(MIXES)}, one of them")
    return _traced(choice) if mix is None else _mixed(choice)


def _traced(choice: Mapping[str, Any]) -> Workload:
    _refuse(choice, ("arrivals", "prompt", "answer"), "--mix")
    if choice["rate"] is not None and choice["rate_scale"] is not None:
        raise WorkloadError("--rate and --rate-scale: take one of them")
    return scaled(
        read_trace(choice["trace"]),
        rate=1.0 if choice["rate_scale"] is None else choice["rate_scale"],
        requests_per_s=choice["rate"],
        length=choice["length_scale"],
        requests=choice["requests"],
        seconds=choice["seconds"],
    )


def _mixed(choice: Mapping[str, Any]) -> Workload:
    _refuse(choice, ("rate_scale",), "--trace")
    if choice["mix"] != UNIFORM:
        _refuse(choice, ("prompt", "answer"), f"--mix {UNIFORM}")
    seconds = choice["seconds"]
    if seconds is None and choice["requests"] is None:
        seconds = _SECONDS
    drawn = make_mix(
        choice["mix"],
        _RATE if choice["rate"] is None else choice["rate"],
        seconds,
        choice["seed"],
        choice["arrivals"] or "poisson",
        requests=choice["requests"],
        prompt=choice["prompt"] or UNIFORM_PROMPT,
        answer=choice["answer"] or UNIFORM_ANSWER,
    )
    return scaled(drawn, length=choice["length_scale"])


def _refuse(choice: Mapping[str, Any], names: tuple[str, ...], whose: str) -> None:
    for name in names:
        if choice[name] is not None:
            raise WorkloadError(f"--{name.replace('_', '-')} goes with {whose} alone: drop it")
