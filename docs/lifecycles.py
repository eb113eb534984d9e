"""Draws docs/LIFECYCLES.md from the transition tables in the code.

`python docs/lifecycles.py` writes it; with --check it fails when the file is not what the tables
give (`make check`). It knows where the tables are and nothing of what is in them: what states and
events mean is read from the comments beside them.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "LIFECYCLES.md"

INTRODUCTION = """\
# Lifecycles

Drawn by `make docs` from the tables in the code; `make check` fails when this page and they differ.

Each lifecycle is an enum of states, an enum of events and one table. An event that has no row for a
state (-) raises and changes nothing. Rows that leave the state as it is are in the tables (*stays*)
and not in the diagrams. Cancel, timeout, the death of each peer and drain have a row in every state
that is not an end. A block knows neither requests nor peers: what happens to its owner reaches it
as release, abort or unshare, a writer's death as writer gone, and a drain not at all. A kept answer
is let go of with its reservation; of its own it knows its router and its time alone.
"""

_MEMBER = re.compile(r"^    (\w+) = [^#]*?(?:  # (.*))?$")
_MORE = re.compile(r"^    \s*# (.*)$")

# Title, module, table. Each is drawn in this order.
PLACES = (
    ("Request at the router", "router.request", "TRANSITIONS"),
    ("Job of a prefill worker", "prefill_worker.schedule", "TRANSITIONS"),
    ("Reservation of a decode worker", "decode_worker.reservation", "TRANSITIONS"),
    ("Kept answer of a decode worker", "decode_worker.kept", "TRANSITIONS"),
    ("KV block", "kvrelay.kv.ledger", "MOVES"),
    ("Place of a worker or router", "cluster.place", "TRANSITIONS"),
)


@dataclass(frozen=True)
class Lifecycle:
    """`source` is where its table stands: path and name."""

    title: str
    source: str
    table: Mapping[tuple[Enum, Enum], Enum]

    @property
    def states(self) -> type[Enum]:
        return type(next(iter(self.table))[0])

    @property
    def events(self) -> type[Enum]:
        return type(next(iter(self.table))[1])


def lifecycle(title: str, module: str, table: str) -> Lifecycle:
    source = f"{module.replace('.', '/')}.py: {table}"
    return Lifecycle(title, source, getattr(importlib.import_module(module), table))


def page(all_of_them: Iterable[Lifecycle]) -> str:
    return "\n".join([INTRODUCTION, *map(section, all_of_them)])


def section(one: Lifecycle) -> str:
    parts = [
        f"## {one.title}\n\n`{one.source}`\n",
        diagram(one),
        matrix(one),
        "States:\n",
        meanings(one.states),
        "Events:\n",
        meanings(one.events),
    ]
    return "\n".join(parts)


def diagram(one: Lifecycle) -> str:
    """Mermaid; one arrow for all events that lead from one state to another."""
    arrows: dict[tuple[Enum, Enum], list[str]] = {}
    for (state, event), target in one.table.items():
        if target is not state:
            arrows.setdefault((state, target), []).append(name(event))
    first, *_ = one.states
    ends = [s for s in one.states if s not in {state for state, _ in one.table}]
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    lines += [f"    {state.name} : {name(state)}" for state in one.states]
    lines += [f"    {a.name} --> {b.name} : {', '.join(on)}" for (a, b), on in arrows.items()]
    lines += [f"    {state.name} --> [*]" for state in ends]
    return "\n".join([*lines, "```", ""])


def matrix(one: Lifecycle) -> str:
    """Events down, states across, but for those that are ends."""
    live = [s for s in one.states if s in {state for state, _ in one.table}]
    rows = [["event", *map(name, live)], ["---"] * (len(live) + 1)]
    for event in one.events:
        cells = [cell(state, one.table.get((state, event))) for state in live]
        rows.append([name(event), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def cell(state: Enum, target: Enum | None) -> str:
    if target is None:
        return "-"
    return "*stays*" if target is state else name(target)


def meanings(enum: type[Enum]) -> str:
    """A list of the members that have a comment."""
    said = comments(inspect.getsource(enum))
    lines = [f"- **{name(member)}**: {said[member.name]}" for member in enum if member.name in said]
    return "\n".join([*lines, ""]) if lines else "The names say it.\n"


def comments(source: str) -> dict[str, str]:
    """By member, the comment on its line and those on lines of their own after it."""
    found: dict[str, str] = {}
    last = ""
    for line in source.splitlines():
        if member := _MEMBER.match(line):
            last = member[1]
            if member[2]:
                found[last] = member[2]
        elif (more := _MORE.match(line)) and last in found:
            found[last] += f" {more[1]}"
        else:
            last = ""
    return found


def name(member: Enum) -> str:
    return str(member.value).replace("_", " ")


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    drawn = page(lifecycle(*place) for place in PLACES)
    if arguments == ["--check"]:
        if not TARGET.exists() or TARGET.read_text() != drawn:
            print("docs/LIFECYCLES.md is not up to date: run `make docs`, commit", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
