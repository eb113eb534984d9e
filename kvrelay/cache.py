"""The cache folder: where it is, and how an entry comes into it whole and once.

Used by cluster/model_store.py for converted models and by kvrelay/engine for prepared weights. An
entry is a folder that never changes; what it is made from is part of its name.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

# Large models take minutes; who waits longer is told so instead of hanging.
_BUILD_WAIT_S = 3600.0


class CacheError(Exception):
    """An entry cannot be made; the text is for the person, one line."""


def default_cache() -> Path:
    """$KVRELAY_CACHE, else $XDG_CACHE_HOME/kvrelay, else ~/.cache/kvrelay; always absolute, since
    workers need not run where the person typed."""
    if own := os.environ.get("KVRELAY_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "kvrelay"
    return Path.home() / ".cache" / "kvrelay"


def build_once(
    target: Path,
    build: Callable[[Path], None],
    on_wait: Callable[[], None],
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """`target`, which `build` fills if it is not there; one builder at a time on this host.

    `is_whole` looks at an entry that is there: one that is not whole is removed and built again.

    `build` gets an empty sibling folder, renamed when it returns: nobody sees an entry half made.
    `on_wait` is called when another process is at it.

    Raises:
        CacheError: the cache cannot be written (an OSError of `build` counts as that), or another
            has been building for too long. Whatever else `build` raises passes through.
    """
    if is_whole(target):
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _builders_lock(target, on_wait):
            if not is_whole(target):  # else another built it meanwhile
                shutil.rmtree(target, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed
                partial.mkdir()
                _build_whole(partial, build)
                partial.replace(target)
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CacheError(
            f"cannot write to the cache: {reason}; set KVRELAY_CACHE to another folder"
        ) from error
    return target


def _build_whole(partial: Path, build: Callable[[Path], None]) -> None:
    """Leaves nothing of `partial` when it fails or is interrupted."""
    try:
        build(partial)
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(folder: Path) -> None:
    """Without it a power cut after the rename could leave empty files under the final name."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


@contextlib.contextmanager
def _builders_lock(target: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        try:
            lock.acquire(timeout=_BUILD_WAIT_S)
        except Timeout as error:
            raise CacheError(
                f"another kvrelay has been preparing this model for {_BUILD_WAIT_S / 60:.0f} min"
                f" and holds {lock.lock_file}: end it and start again"
            ) from error
    try:
        yield
    finally:
        lock.release()
