from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv.block_journal import BlockJournal, Changes

A, B, C = (bytes([letter]) * 16 for letter in b"abc")


class Index(set[bytes]):
    """A cache's index, and somebody who applies what its journal says."""

    def __init__(self, names_max: int = 100) -> None:
        super().__init__()
        self.journal = BlockJournal(self, names_max)
        self.heard: set[bytes] = set()

    def put(self, name: bytes) -> None:
        self.add(name)
        self.journal.add([name])

    def drop(self, name: bytes) -> None:
        self.remove(name)
        self.journal.remove([name])

    def hear(self) -> Changes | None:
        changes = self.journal.take()
        if changes is not None:
            assert not set(changes.added) & set(changes.removed)
            if changes.everything:
                self.heard.clear()
            self.heard |= set(changes.added)
            self.heard -= set(changes.removed)
        return changes


def test_what_has_changed_is_told_once():
    index = Index()
    index.put(A)
    index.put(B)
    first = index.hear()
    assert first is not None
    assert (first.everything, list(first.added), list(first.removed)) == (False, [A, B], [])
    index.drop(A)
    index.put(C)
    second = index.hear()
    assert second is not None
    assert (list(second.added), list(second.removed)) == ([C], [A])
    assert index.hear() is None


def test_what_came_and_went_is_not_told():
    index = Index()
    index.put(A)
    index.drop(A)
    assert index.hear() is None
    index.put(A)
    index.hear()
    index.drop(A)
    index.put(A)
    assert index.hear() is None


def test_too_much_to_tell_is_everything():
    index = Index(names_max=2)
    index.put(A)
    index.put(B)
    assert index.hear() == Changes(False, {A: None, B: None}, {})
    index.drop(A)
    index.put(C)
    index.drop(B)  # the third
    index.put(A)  # after it, too
    changes = index.hear()
    assert changes is not None
    assert (changes.everything, set(changes.added), list(changes.removed)) == (True, {A, C}, [])
    index.drop(C)
    changes = index.hear()
    assert changes is not None
    assert not changes.everything  # as before


def test_a_snapshot_takes_nothing_and_does_not_change_afterwards():
    index = Index()
    index.put(A)
    snapshot = index.journal.snapshot()
    index.put(B)
    assert snapshot == Changes(True, [A])
    changes = index.hear()
    assert changes is not None
    assert list(changes.added) == [A, B]


def test_news_is_rung_for_once_until_it_is_taken():
    index = Index()
    rung: list[int] = []
    index.journal.on_news = lambda: rung.append(len(rung))
    index.put(A)
    index.put(B)
    assert len(rung) == 1
    index.hear()
    index.drop(A)
    assert len(rung) == 2


@settings(max_examples=300, deadline=None)
@given(
    names_max=st.integers(1, 8),
    steps=st.lists(st.one_of(st.sampled_from(list(range(12))), st.just("hear")), max_size=120),
)
def test_whoever_applies_what_is_told_has_the_index(names_max, steps):
    """A name that is there is dropped, one that is not is put."""
    index = Index(names_max)
    for step in steps:
        if step == "hear":
            before = set(index.heard)
            told = index.hear()
            assert index.heard == index
            assert told is not None or before == index
            continue
        name = bytes([step]) * 16
        (index.drop if name in index else index.put)(name)
        gathered = len(index.journal._added) + len(index.journal._removed)
        assert gathered <= names_max
    index.hear()
    assert index.heard == index
