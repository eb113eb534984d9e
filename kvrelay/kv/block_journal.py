"""What has changed in the index of a prefix cache since somebody last asked.

A pure object, written by PrefixCache (kvrelay/kv/prefix_cache.py) and read by the Announcer of the
worker (kvrelay/announcer.py), which tells routers. What came and went in between is not told, and
memory is bounded: whoever has too much to tell says everything anew.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

NAMES_MAX = 65_536  # gathered changes; 1 MiB of names


class Changes(NamedTuple):
    """everything: `added` is all there is; what was known before is void."""

    everything: bool
    added: Collection[bytes]
    removed: Collection[bytes] = ()


class BlockJournal:
    """`index` is the cache's own, by name; the journal only reads it, and for `snapshot` alone.

    on_news is called at the first change after each `take`: it must be quick and change nothing.
    """

    def __init__(self, index: Collection[bytes], names_max: int = NAMES_MAX) -> None:
        self.on_news: Callable[[], None] = _nobody
        self._index = index
        self._names_max = names_max
        # Disjoint, and in order of time.
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._overflowed = False
        self._quiet = True  # nothing since the last take

    def add(self, names: Collection[bytes]) -> None:
        """The index has these names now, and had none of them before."""
        self._note(names, self._added, self._removed)

    def remove(self, names: Collection[bytes]) -> None:
        """The index had these names, and has none of them any more."""
        self._note(names, self._removed, self._added)

    def take(self) -> Changes | None:
        """What has changed since the last take, or None."""
        added, removed, overflowed = self._added, self._removed, self._overflowed
        self._added, self._removed, self._overflowed = {}, {}, False
        self._quiet = True
        if overflowed:
            return self.snapshot()
        return Changes(False, added, removed) if added or removed else None

    def snapshot(self) -> Changes:
        """All that is in the index. Takes nothing: changes that were not taken are in it already,
        and to hear of them again afterwards does no harm."""
        return Changes(True, list(self._index))

    def _note(
        self, names: Collection[bytes], to: dict[bytes, None], undone: dict[bytes, None]
    ) -> None:
        if not names:
            return
        if self._quiet:
            self._quiet = False
            self.on_news()
        if self._overflowed:
            return
        if undone.keys().isdisjoint(names):
            to.update(dict.fromkeys(names))
        else:
            for name in names:
                if name in undone:
                    del undone[name]
                else:
                    to[name] = None
        if len(self._added) + len(self._removed) > self._names_max:
            self._added, self._removed, self._overflowed = {}, {}, True


def _nobody() -> None:
    """Nobody waits for news."""
