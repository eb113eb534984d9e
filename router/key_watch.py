"""Reads the file of API keys again when it changes, while the router serves.

Run by router/main.py. A file is looked at every keys_check_ms, and at once after `look` (SIGHUP).
One that cannot be used changes nothing: the keys that were good stay good. Nothing that goes wrong
ends the watch: a key that was removed would be good for ever.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from router.callers import Callers
from router.keys import KeysError, KeySet

log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]


class KeyWatch:
    def __init__(self, path: Path, callers: Callers, check_ms: int) -> None:
        """Raises KeysError when the file cannot be used now."""
        self._path = path
        self._callers = callers
        self._check_s = check_ms / 1000
        self._asked = asyncio.Event()
        self._seen = _stamp(path)
        callers.replace(KeySet.load(path))

    def look(self) -> None:
        """Reads the file again now, changed or not."""
        self._asked.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_s):
                    await self._asked.wait()
            try:
                await self._check()
            except Exception:
                log.exception("looking at the file of API keys failed; the keys stay as they were")

    async def _check(self) -> None:
        stamp = await asyncio.to_thread(_stamp, self._path)
        if stamp == self._seen and not self._asked.is_set():
            return
        self._asked.clear()
        self._seen = stamp  # a broken file is told of once
        try:
            keys = await asyncio.to_thread(KeySet.load, self._path)
        except KeysError as error:
            log.error("the API keys stay as they were: %s", error)
            return
        self._callers.replace(keys)
        log.info("%d API keys", len(keys))


def _stamp(path: Path) -> _Stamp | None:
    """Differs when the file has changed, or another has taken its place, as in a mounted secret."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
