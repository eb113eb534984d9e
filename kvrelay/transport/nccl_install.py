"""Which NCCL this process has loaded, and that it is one. Asked once, by `NvidiaNccl.load`.

Two copies of NCCL in a process do not share their state: they may deadlock on the device, and
which of them answers a call depends on the order of imports.
"""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from kvrelay.transport.nccl_errors import NcclUnavailableError

_MAPPINGS = Path("/proc/self/maps")
_PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_ADVICE = (
    "Use one: with nvidia-nccl-cu12 goes a torch built for CUDA 12 (for torch 2.13 the cu126 "
    "build); torch 2.13 as the package index serves it is built for CUDA 13 and brings "
    "nvidia-nccl-cu13. Then uninstall both packages and install the one that torch asks for"
)


def refuse_two_nccls(mappings: Path = _MAPPINGS) -> None:
    """NcclUnavailableError when two NCCLs are loaded, or two packages own the one file of it."""
    loaded = loaded_nccls(mappings.read_text(errors="replace").splitlines())
    if len(loaded) > 1:
        files = " and ".join(f"{path} (of {package_of(path)})" for path in loaded)
        raise NcclUnavailableError(f"two NCCLs are loaded in this process: {files}. {_ADVICE}")
    installed = [name for name in _PACKAGES if _version(name)]
    if len(installed) > 1:
        # Both install nvidia/nccl/lib/libnccl.so.2: the later one has overwritten the other.
        names = " and ".join(f"{name} {_version(name)}" for name in installed)
        raise NcclUnavailableError(
            f"{names} are both installed, and each has written its library to the same file. "
            f"{_ADVICE}"
        )


def loaded_nccls(lines: Iterable[str]) -> list[Path]:
    """The files libnccl.so* in lines of /proc/PID/maps, each once, sorted."""
    # address permissions offset device inode path; a path may have spaces in it
    fields = (line.split(None, 5) for line in lines)
    paths = {Path(parts[5].removesuffix(" (deleted)")) for parts in fields if len(parts) == 6}
    return sorted(path for path in paths if path.name.startswith("libnccl.so"))


def package_of(path: Path) -> str:
    """The installed package that owns a file of NCCL, with its version."""
    for name in (*_PACKAGES, "torch"):
        version = _version(name)
        if version is None:
            continue
        folder = Path(str(metadata.distribution(name).locate_file("")))
        owned = "torch" if name == "torch" else "nvidia/nccl"
        if path.resolve().is_relative_to((folder / owned).resolve()):
            return f"{name} {version}"
    return "no Python package"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
