"""`kvrelay simulate`: registered by cluster/cli.py. Loads the workers' code only when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.capacity.device import DeviceProfile, ProfileError
from cluster.progress import console, errors_in_one_line, reporting, result_console
from cluster.workload.asks import WorkloadError
from cluster.workload.options import chosen_workload, workload_options
from cluster.workload.slo import Slo

if TYPE_CHECKING:
    from cluster.capacity.result import Result
    from cluster.capacity.run import Setting

PROFILES = Path(__file__).parent / "profiles"
_LOCAL = ("auto", "never", "only")


class OptionsError(Exception):
    """Choices that do not go together; one line that says what to do."""


def known_profiles() -> list[str]:
    """Names of those that come with kvrelay."""
    return sorted(file.stem for file in PROFILES.glob("*.json"))


def read_profile(name: str) -> DeviceProfile:
    """One that comes with kvrelay, by its name, or a file. Raises ProfileError."""
    own = PROFILES / f"{name}.json"
    if name in known_profiles():
        return DeviceProfile.read(own)
    file = Path(name)
    if not file.exists():
        known = ", ".join(known_profiles())
        raise ProfileError(
            f"there is no profile {name}: name a file that `kvrelay profile` has written, "
            f"or one of {known}"
        )
    return DeviceProfile.read(file)


@click.command()
@workload_options
@click.option("--prefill", type=click.IntRange(0, 100_000), default=1, show_default=True)
@click.option("--decode", type=click.IntRange(1, 100_000), default=1, show_default=True)
@click.option(
    "--routers",
    type=click.IntRange(1, 1_000),
    default=1,
    show_default=True,
    help="Each knows all workers; requests are dealt out at random.",
)
@click.option(
    "--profile",
    required=True,
    metavar="FILE|NAME",
    help="What workers' steps cost: of `kvrelay profile`, or one that comes along.",
)
@click.option("--link", help="Of the profile's hand-offs. [the first]")
@click.option(
    "--local-prefill",
    type=click.Choice(_LOCAL),
    default="auto",
    show_default=True,
    help="Prompts computed by decode workers; only: without prefill workers.",
)
@click.option(
    "--itl-target-ms",
    type=click.IntRange(0),
    help="Of decode workers' steps. [--tpot-ms; with --aim none]",
)
@click.option(
    "--aim",
    is_flag=True,
    help="Routers and workers know the SLO, as of `kvrelay serve --ttft-target-ms "
    "--tpot-target-ms`.",
)
@click.option("--block-size", type=click.IntRange(1), help="Tokens of a KV block. [the profile's]")
@click.option("--chunk-tokens", type=click.IntRange(1), help="Of a step. [the profile's]")
@click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True)
@click.option(
    "--network-ms",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Between router and worker, one way.",
)
@click.option("--queue-max", type=click.IntRange(1), default=1024, show_default=True)
@click.option(
    "--kill-every",
    "kill_every_s",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="A worker dies so often, and is replaced 5 s later. [never]",
)
@click.option(
    "--router-cost",
    "metered",
    is_flag=True,
    help="Measure what the routers' decisions cost this processor.",
)
@click.option(
    "--every-step",
    is_flag=True,
    help="Play every decode step by itself, with a message to the router, as real workers do.",
)
@click.option(
    "--find-rate",
    is_flag=True,
    help="Find the highest rate at which 90 % of requests meet the SLO. For a --mix.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes, each with its part of the workers and requests and routers of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with plots, into a .html file.",
)
def simulate(*, as_json: bool, page: Path | None, **choice: Any) -> None:
    """Play a workload on any number of simulated workers.

    Queue, placement, batching, reservations, prefix caches and recovery are the code that serves;
    time is virtual, and what a step takes comes from a device profile.
    """
    errors = (OptionsError, WorkloadError, ProfileError, BenchError)
    with errors_in_one_line(*errors):
        if page:
            check_plot(page, option="--report", suffix=".html")
        slo = Slo(choice["ttft_ms"], choice["tpot_ms"])
        profile = read_profile(choice["profile"])
        profile.hand_off(choice["link"])
        if choice["find_rate"]:
            _check_search(choice)
        workload = chosen_workload(choice)
        from cluster.capacity.result import Result
        from cluster.capacity.run import SimulationError

        with errors_in_one_line(SimulationError), reporting() as on_progress:
            setting = _setting(choice, profile)
            if choice["find_rate"]:
                result = _searched(setting, choice, slo, on_progress)
            else:
                result = Result.of(setting, workload, slo, on_progress, choice["jobs"])
        _show(result, as_json)
        if page:
            from cluster.capacity.page import write_simulation_page

            write_simulation_page(result, page)
            console.print(f"report: {page}", markup=False)


def _setting(choice: dict[str, Any], profile: DeviceProfile) -> "Setting":
    from cluster.capacity.run import Setting

    only = choice["local_prefill"] == "only"
    aim, itl_target_ms = choice["aim"], choice["itl_target_ms"]
    if itl_target_ms is None:
        itl_target_ms = 0 if aim else int(choice["tpot_ms"])
    return Setting(
        profile,
        prefill=0 if only else choice["prefill"],
        decode=choice["decode"],
        routers=choice["routers"],
        local_prefill="auto" if only else choice["local_prefill"],
        itl_target_ms=itl_target_ms,
        ttft_target_ms=choice["ttft_ms"] if aim else 0.0,
        tpot_target_ms=choice["tpot_ms"] if aim else 0.0,
        network_ms=choice["network_ms"],
        link=choice["link"],
        block_tokens=choice["block_size"],
        chunk_tokens=choice["chunk_tokens"],
        prefix_caching=choice["prefix_caching"],
        queue_max=choice["queue_max"],
        kill_every_s=choice["kill_every_s"],
        seed=choice["seed"],
        together=not choice["every_step"],
        metered=choice["metered"],
    )


def _check_search(choice: dict[str, Any]) -> None:
    if choice["mix"] is None:
        raise OptionsError("--find-rate draws requests at many rates: it needs a --mix")
    if choice["rate"] is not None:
        raise OptionsError("--find-rate and --rate: drop one of them")


def _searched(setting: "Setting", choice: dict[str, Any], slo: Slo, on_progress: Any) -> "Result":
    from cluster.capacity.search import find_rate

    return find_rate(
        setting,
        lambda rate: chosen_workload({**choice, "rate": rate}),
        slo,
        on_progress,
        choice["jobs"],
    )


def _show(result: "Result", as_json: bool) -> None:
    if as_json:
        print(result.to_json())
        return
    from cluster.load.table import time_table, value_table

    out = result_console()
    out.print(result.heading(), soft_wrap=True)
    out.print(time_table(result.figures))
    out.print(value_table(result.figures))
    out.print(result.table())
    for note in result.notes():
        out.print(note, soft_wrap=True)
