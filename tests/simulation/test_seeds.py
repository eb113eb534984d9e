"""Whole clusters by seed: no violation, and the same seed is the same run, in any process."""

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from cluster.simulation.world import run

SEEDS = 150
SEEDS_OF_ALL = 10_000
REFUSALS = ("QueueFullError", "DeadlineError", "ExhaustedTrouble")
AFTER_FAULTS = ("UnavailableTrouble", "PoisonTrouble")


def played(seeds: range) -> Counter[str]:
    """Faults and outcomes of all; fails at the first violation, with what came before it."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        result = run(seed)
        if result.violations:
            tail = "\n".join(result.trace[-40:])
            again = f"again: python -m cluster.simulation --seed {seed} --trace"
            pytest.fail(f"{tail}\nseed {seed}: {result.violations}\n{again}")
        seen += result.faults + result.outcomes
    return seen


def test_no_seed_violates_anything():
    seen = played(range(SEEDS))
    for fault in ("kill", "stop", "cut", "break", "slow", "spoil blocks"):
        assert seen[fault], f"no seed had the fault {fault}"
    assert seen["QueueFullError"]
    outcomes = ("finished", "cancelled", *REFUSALS, *AFTER_FAULTS)
    ended = sum(seen[outcome] for outcome in outcomes)
    assert seen["finished"] > 0.6 * ended
    assert 0 < seen["cancelled"] < 0.3 * ended
    assert seen["ExhaustedTrouble"] < 0.05 * ended
    assert sum(seen[outcome] for outcome in AFTER_FAULTS) < 0.01 * ended


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_seeds_violate_nothing():
    played(range(SEEDS, SEEDS + SEEDS_OF_ALL))


HASHED = (3, 5, 8, 13, 21)


def test_the_same_seed_gives_the_same_hash_in_every_process():
    code = (
        f"from cluster.simulation.world import run\nprint(*(run(seed).hash for seed in {HASHED}))"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    here = [run(seed).hash for seed in HASHED]
    assert here == [run(seed).hash for seed in HASHED]
    assert there.stdout.split() == here
    assert len(set(here)) == len(HASHED)


def test_no_real_clock_is_read(monkeypatch):
    """A run that did would not be the same twice."""

    def read(*_: object) -> float:
        raise AssertionError("a simulated run has read a real clock")

    for clock in ("monotonic", "perf_counter", "time", "sleep"):
        monkeypatch.setattr(time, clock, read)
    result = run(HASHED[0])
    monkeypatch.undo()
    assert not result.violations
