"""`kvrelay profile` and `kvrelay bench validate`: registered by cluster/cli.py. What measures is
loaded only when it is asked to."""

import contextlib
import sys
from pathlib import Path
from typing import Any, get_args

import click

from cluster.bench.commands import bench, show
from cluster.bench.report import BenchError
from cluster.capacity.device import DeviceProfile, ProfileError
from cluster.model_store import ModelError, prepare
from cluster.options import ServeError
from cluster.progress import console, errors_in_one_line, reporting
from cluster.workload.asks import WorkloadError
from kvrelay.config import KvDtype, LocalPrefill, Quantize


@click.command()
@click.argument("model")
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="int8")
@click.option("--kv-dtype", type=click.Choice(get_args(KvDtype)), default="auto")
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="0: as kvrelay serve gives them to one prefill and one decode worker.",
)
@click.option(
    "--kv-gib", type=click.FloatRange(0.001, 1024), default=1.0, help="KV pool of each worker."
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(16, 1 << 20),
    default=256,
    help="Prompt tokens a prefill step.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="The profile, in JSON."
)
@click.option("--quick", is_flag=True, help="Fewer steps, and less time for each.")
@click.option("--json", "as_json", is_flag=True, help="The table as one JSON object on stdout.")
def profile(model: str, *, out: Path | None, as_json: bool, **choice: Any) -> None:
    """Measure what MODEL's steps and hand-offs take here, for `kvrelay simulate`.

    Steps of an engine with the cores of one worker, alone and beside a busy neighbour; then a
    cluster of 1 + 1 workers over each KV link. Do it on a quiet machine.
    """
    with errors_in_one_line(ModelError, BenchError, ServeError, ProfileError):
        if out and not out.parent.is_dir():
            raise ProfileError(f"--out {out}: no folder {out.parent}")
        with contextlib.redirect_stdout(sys.stderr), reporting() as on_progress:
            prepared = prepare(model, on_progress=on_progress)
            from cluster.profiling.profile import ProfileAsk, profile_device

            command = " ".join(["kvrelay", *sys.argv[1:]])
            profiled = profile_device(prepared, ProfileAsk(command=command, **choice), on_progress)
        show(profiled.report, as_json, lambda: profiled.report.table("fitted"))
        if out:
            profiled.profile.write(out)
            console.print(f"profile: {out}")


@bench.command()
@click.argument("model")
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Of MODEL on this machine, by kvrelay profile.",
)
@click.option(
    "--rate", type=click.FloatRange(0.01, 1000), default=1.0, help="Requests a second, Poisson."
)
@click.option("--seconds", type=click.FloatRange(1, 86_400), default=120.0)
@click.option(
    "--warm-up",
    "warm_up_s",
    type=click.FloatRange(0, 3600),
    default=15.0,
    help="So many seconds of requests before, which are in no figure.",
)
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="int8")
@click.option("--kv-dtype", type=click.Choice(get_args(KvDtype)), default="auto")
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="As the profile was measured with. 0: as kvrelay serve gives them.",
)
@click.option("--local-prefill", type=click.Choice(get_args(LocalPrefill)), default="auto")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def validate(model: str, *, profile_file: Path, as_json: bool, **choice: Any) -> None:
    """Compare `kvrelay simulate` with reality: the same requests to MODEL served here by 1 + 1
    workers, and simulated.

    Prompts of 64 to 512 tokens, answers of 16 to 64. Do it on a quiet machine, soon after the
    profile was measured.
    """
    with errors_in_one_line(ModelError, BenchError, ServeError, ProfileError, WorkloadError):
        device = DeviceProfile.read(profile_file)
        with contextlib.redirect_stdout(sys.stderr), reporting() as on_progress:
            prepared = prepare(model, on_progress=on_progress)
            from cluster.profiling.validation import ValidationAsk
            from cluster.profiling.validation import validate as compare

            report = compare(prepared, device, ValidationAsk(**choice), on_progress)
        show(report, as_json, lambda: report.table("real"))
