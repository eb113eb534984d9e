"""The machine and the versions that a report was measured with. Every bench begins its report here.

Loads neither torch nor transformers.
"""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

# What decides how fast a matrix product can be, as Linux spells it on x86 and Arm.
_ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)


# In the terms of /proc/stat.
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_OTHERS_MAX = 0.2  # cores
_LOOK_S = 0.5


def cores_usable() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def describe_machine(threads: int) -> dict[str, Any]:
    """The first part of a report's `machine`."""
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "cores": cores_usable(),
        "threads": threads,
        **{package: _version(package) for package in ("kvrelay", "torch", "transformers")},
    }


def commit() -> str:
    """Of the checkout that this runs from; nothing where it was installed."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class OtherPrograms:
    """How busy others have kept the cores that this process may use, since this was made.

    They take more from a program that shares its work out evenly among threads than from one whose
    threads help each other out; so they change ratios, too.
    """

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def cores_busy(self) -> float:
        """On average; what a hypervisor took for others counts."""
        wall, all_busy, own = (
            now - before for now, before in zip(_processor_seconds(), self._start, strict=True)
        )
        return round(max(0.0, all_busy - own) / max(wall, 1e-9), 2)


class QuietLooks:
    """The same for a bench that runs clusters: what Ray's processes have used is in no account of
    ours once they have ended, so others are looked at while the bench does nothing: as this is
    made, at each `look`, and at the end."""

    def __init__(self) -> None:
        self._seen: list[float] = []
        self.look()

    def look(self) -> None:
        """Takes _LOOK_S, while nothing of the bench runs."""
        others = OtherPrograms()
        time.sleep(_LOOK_S)
        self._seen.append(others.cores_busy())

    def cores_busy(self) -> float:
        """On average over all looks."""
        self.look()
        return round(fmean(self._seen), 2)


def unrest(cores_busy: float) -> list[str]:
    """A note for the report if the machine was not quiet."""
    if cores_busy < _OTHERS_MAX:
        return []
    return [f"other programs kept {cores_busy:.1f} cores busy meanwhile: measure again without."]


def _processor_seconds() -> tuple[float, float, float]:
    """Of the wall's clock, of our cores while they did something, of this process and its children
    that have ended."""
    every = psutil.cpu_times(percpu=True)
    usable = [times for core, times in enumerate(every) if core in os.sched_getaffinity(0)]
    busy = sum(sum(getattr(times, kind, 0.0) for kind in _BUSY) for times in usable)
    own = psutil.Process().cpu_times()
    ended_children = own.children_user + own.children_system
    return time.monotonic(), busy, own.user + own.system + ended_children


def _cpuinfo() -> dict[str, str]:
    """Of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
