"""Silence: what counts, and what is the watcher's own."""

import pytest

from cluster.pulse import Pulse


def test_silence_is_what_was_watched_of_it():
    pulse = Pulse(100.0)
    for now_s in (100.5, 101.0, 102.5):
        pulse.look(now_s, beat=False)
    assert pulse.silent_s == 2.5


def test_a_sign_of_life_ends_it():
    pulse = Pulse(0.0)
    pulse.look(1.0, beat=False)
    pulse.look(2.0, beat=True)
    assert pulse.silent_s == 0.0
    pulse.look(2.5, beat=False)
    assert pulse.silent_s == 0.5


@pytest.mark.parametrize("away_s", [60.0, 86_400.0])
def test_nobody_is_blamed_for_the_time_that_the_watcher_was_away(away_s):
    pulse = Pulse(0.0)
    pulse.look(away_s, beat=False)
    assert pulse.silent_s == 2.0
    pulse.look(away_s + 0.5, beat=True)
    assert pulse.silent_s == 0.0
