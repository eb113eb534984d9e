"""Owns what makes an answer the right one: it is what was answered before the first fault.

Called by load.py for every answer. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_REPEATED_MAX = 64  # tokens, or characters, that may have come again


@dataclass(frozen=True)
class Answer:
    """`token_ids` None: over HTTP there are none. `cut`: its client had enough and broke off, so
    nobody has said why it ended."""

    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str
    cut: bool = False


@dataclass(frozen=True)
class Difference:
    """What is not as it should be. `repeated`: something came twice."""

    kind: Literal["wrong", "repeated"]
    what: str


def difference(right: Answer, got: Answer) -> Difference | None:
    """How `got` differs from the right answer, or None. Of an answer that its client cut short,
    what came has to be the beginning of the right one."""
    whole = not got.cut
    if got.token_ids is not None and right.token_ids is not None:
        found = _differ("token", right.token_ids, got.token_ids, whole=whole)
        if found is not None:
            return found
    found = _differ("character", right.text, got.text, whole=whole)
    if found is not None or not whole or got.finish_reason == right.finish_reason:
        return found
    reason = got.finish_reason or "no reason"
    what = f"it ended for {reason}, and not for {right.finish_reason}"
    return Difference("wrong", what)


def _differ(
    one: str, right: Sequence[object], got: Sequence[object], *, whole: bool
) -> Difference | None:
    """`one` is what one of a sequence is called."""
    at = next((i for i, (a, b) in enumerate(zip(right, got, strict=False)) if a != b), None)
    if at is None:
        if len(got) == len(right) or (not whole and len(got) < len(right)):
            return None
        at = min(len(got), len(right))
    if _comes_again(right, got, at):
        return Difference("repeated", f"{one} {at} came before")
    if at == len(got):
        return Difference("wrong", f"it ends after {at} of {len(right)} {one}s")
    due = repr(right[at]) if at < len(right) else "nothing"
    return Difference("wrong", f"{one} {at} is {got[at]!r}, and should be {due}")


def _comes_again(right: Sequence[object], got: Sequence[object], at: int) -> bool:
    """From `at` on `got` begins again a little before it: what follows is right, but late."""
    rest = got[at:]
    if not rest:
        return False
    sizes = range(1, min(at, _REPEATED_MAX) + 1)
    return any(rest[: len(right) - at + n] == right[at - n : at - n + len(rest)] for n in sizes)
