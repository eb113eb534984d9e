"""The machine and the versions that a report was measured with. Every bench begins its report here.

Reads /proc/cpuinfo and package metadata only: neither torch nor transformers is loaded.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
