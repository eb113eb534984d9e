"""What is done to each transfer of the conformance suite, drawn from a seed.

SHARES says how many of a thousand transfers get each fault. A plan has all that was drawn, so that
a failure prints it.
"""

import random
from dataclasses import dataclass, replace

SHARES = {
    "none": 200,
    "kill": 58,
    "stop": 25,
    "stall": 25,  # the wire stands still until both ends have given up
    "stale": 52,  # an ended ticket; in one of four, because D was killed and another is there
    "flip": 160,
    "duplicate": 120,
    "reorder": 120,
    "truncate": 120,
    "give_up": 60,  # by P's worker
    "cancel": 60,  # by D's worker
}
assert sum(SHARES.values()) == 1000

PHASES = (
    "before hello",
    "after hello",
    "before begin",
    "after begin",
    "in a push",
    "between pushes",
    "before commit",
    "after commit",
    "after committed",
)
_OF_FAULT = {
    "stall": ("before hello", "after hello", "in a push", "after commit"),
    "give_up": ("after begin", "between pushes", "before commit"),
    "cancel": ("before begin", "after begin", "in a push", "between pushes", "before commit"),
}
STALES = ("expired", "cancelled", "used", "restarted")
INTERRUPTIONS = ("kill", "stop", "stall", "give_up", "cancel")  # at a phase
WIRE_FAULTS = ("flip", "duplicate", "reorder", "truncate")


@dataclass(frozen=True)
class Plan:
    number: int
    fault: str
    phase: str  # of kill, stop, stall, give_up, cancel
    victim: str  # of kill and stop: prefill or decode
    stale: str
    pieces: tuple[int, ...]  # blocks of each push
    content: int  # seeds the bytes of the blocks
    fresh: bool  # over a new connection
    paired: bool  # nccl: waits for a pair first
    toward: str  # of a spoiled frame
    skip: int  # frames before it
    at: float  # where in it, of 1
    times: int  # so many of them are flipped

    beside: int  # blocks of another transfer on the same link; 0 for none
    instead_of: str = ""  # of a calm one: its fault

    def without_fault(self) -> "Plan":
        """The same work: what had to be made anew after the fault is made anew in good order."""
        return replace(self, fault="calm", instead_of=self.fault)


def draw(seed: int, link: str, count: int) -> list[Plan]:
    """The shares are exact, but for rounding; the order and all else is drawn."""
    rng = random.Random(f"{seed} {link}")
    faults = [fault for fault, share in SHARES.items() for _ in range(-(-share * count // 1000))]
    rng.shuffle(faults)
    # Phases in turn, so that none is left out: a share is small in the short form.
    turns = {fault: rng.randrange(len(PHASES)) for fault in SHARES}
    return [_plan(rng, number, fault, turns) for number, fault in enumerate(faults[:count])]


def _plan(rng: random.Random, number: int, fault: str, turns: dict[str, int]) -> Plan:
    turns[fault] += 1
    phases = _OF_FAULT.get(fault, PHASES)
    phase = phases[turns[fault] % len(phases)]
    return Plan(
        number=number,
        fault=fault,
        phase=phase,
        victim=rng.choice(("prefill", "decode")),
        stale=STALES[turns[fault] % len(STALES)],
        pieces=tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3))),
        content=rng.getrandbits(32),
        fresh=phase.endswith("hello") or rng.random() < 0.1,
        paired=rng.random() < 0.7,
        toward=rng.choice(("decode", "decode", "prefill")),
        skip=rng.randint(0, 4),
        at=rng.random(),
        times=rng.choice((1, 1, 1, 2, 3)),
        beside=rng.choice((0, 0, 1, 8)),
    )
