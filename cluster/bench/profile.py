"""Where the time of one step goes, phase by phase, as rows of the engine bench's report."""

from collections.abc import Sequence
from statistics import median

from cluster.bench.report import Row
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice

_STEPS = 15


def profile_rows(
    runner: ModelRunner, steps: Sequence[tuple[str, Sequence[Slice]]]
) -> list[Row] | None:
    """One row for each step's name and phase: per cent of the step, the median of several runs.

    None when the engine cannot tell: only fused models have phases.
    """
    rows = []
    for name, slices in steps:
        wanted = [True] * len(slices)
        profiles = []
        for _ in range(_STEPS):
            runner.step(slices, wanted)
            found = runner.profile()
            if found is None:
                return None
            profiles.append(found)
        for phase in profiles[0]:
            part = median(profile[phase] for profile in profiles)
            rows.append(Row(f"profile/{name}/{phase}", part * 100, "% of the step"))
    return rows
