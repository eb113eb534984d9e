"""What a person sees: a bar or a line on stderr while things start, results on stdout. Used by the
commands.
"""

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cluster.preparation import Progress as Report

console = Console(stderr=True, highlight=False)

_PIPE_COLUMNS = 200  # no figure is cut short in a file


def result_console() -> Console:
    """For tables and sentences on stdout."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = _PIPE_COLUMNS
    return out


@contextlib.contextmanager
def errors_in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with status 1 and one line for an error of these kinds; with 130 and none
    for Ctrl-C."""
    try:
        yield
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """Gives a function (what is happening, fraction or None) that shows it."""
    if not console.is_terminal:
        yield _line_reporter()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        current: dict[str, TaskID] = {}

        def report(stage: str, fraction: float | None) -> None:
            if stage not in current:
                for task in current.values():
                    bars.remove_task(task)
                current.clear()
                current[stage] = bars.add_task(stage, total=None if fraction is None else 1.0)
            bars.update(current[stage], completed=fraction or 0.0)

        yield report


def _line_reporter() -> Report:
    """Into a file or a pipe: one line a stage."""
    last = ""

    def report(stage: str, fraction: float | None) -> None:
        nonlocal last
        if stage != last:
            last = stage
            console.print(stage)

    return report
