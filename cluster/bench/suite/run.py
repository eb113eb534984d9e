"""Runs the parts of the suite, one after another, each in a process of its own with a time limit.

Called by commands.py. A part that fails is said and does not keep the others from running.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.report import BenchError
from cluster.bench.suite.parts import Part
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress, silent
from cluster.serving import Serving

_END_S = 60.0  # a part that is told to end takes its processes with it
_KVRELAY = (sys.executable, "-c", "from cluster.cli import main; main(prog_name='kvrelay')")


@dataclass(frozen=True)
class Ran:
    """error: why there are no results; "" where there are."""

    part: Part
    error: str = ""


def run_parts(
    parts: Sequence[Part], model: PreparedModel, folder: Path, on_progress: Progress
) -> list[Ran]:
    """Results are in `folder` afterwards; those of an earlier run of the same parts are gone."""
    ran = []
    for number, part in enumerate(parts):
        on_progress(f"{part.name} ({number + 1} of {len(parts)})", None)
        made = (folder / name for name in part.makes)
        for old in (part.json(folder), part.page(folder), *made):
            old.unlink(missing_ok=True)
        ran.append(Ran(part, _error(part, model, folder)))
    return ran


def _error(part: Part, model: PreparedModel, folder: Path) -> str:
    missing = [name for name in part.wants if not (folder / name).exists()]
    if missing:
        return f"there is no {missing[0]}, which another part makes"
    try:
        with _server(part, model) as address:
            found = _output(part, folder, address)
        part.json(folder).write_text(found, encoding="utf-8")
    except (BenchError, ServeError, OSError) as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _server(part: Part, model: PreparedModel) -> Iterator[str]:
    if not part.wants_server:
        yield ""
        return
    serving = Serving(model, ServeOptions(port=0, http_port=0, quantize="int8"))
    try:
        serving.start(silent)
        yield f"grpc://{serving.address}"
    finally:
        serving.stop()


def _output(part: Part, folder: Path, address: str) -> str:
    """What it writes to stdout. Raises BenchError when it fails, or takes too long."""
    command = [*_KVRELAY, *part.command(folder, address)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            found, said = run.communicate(timeout=part.limit_s)
        except BaseException as error:
            _end(run)
            if isinstance(error, subprocess.TimeoutExpired):
                text = f"it had not ended after {part.limit_s:g} s"
                raise BenchError(text) from None
            raise
    if run.returncode:
        lines = said.strip().splitlines() or [f"it ended with status {run.returncode}"]
        raise BenchError(lines[-1].removeprefix("error: "))
    return found


def _end(run: "subprocess.Popen[str]") -> None:
    """As Ctrl-C does, so that its own processes end, too."""
    run.send_signal(signal.SIGINT)
    try:
        run.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()
