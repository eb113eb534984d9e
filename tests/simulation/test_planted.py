"""Bugs that are planted are found: otherwise the simulation shows nothing."""

import planted_bugs
import pytest
from planted_bugs import PLANTS, Plant

from cluster.simulation.world import run

SEEDS_MAX = 1000
QUICK_MAX = 40
# Those that a few seeds find.
QUICK = ()


def found_within(plant: Plant, seeds: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    plant(monkeypatch)
    return any(run(seed).violations for seed in range(seeds))


@pytest.mark.parametrize("plant", QUICK, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_within_a_few_seeds(plant, monkeypatch):
    assert found_within(plant, QUICK_MAX, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_every_planted_bug_is_found(plant, monkeypatch):
    assert found_within(plant, SEEDS_MAX, monkeypatch)


def test_each_plant_says_what_it_does():
    assert len(set(PLANTS)) == len(PLANTS) >= 10
    assert all(hasattr(planted_bugs, plant.__name__) for plant in PLANTS)
