"""The life of a place: every event in every state, and how long it stays empty after a failure."""

import itertools

import pytest

from cluster.place import OPEN_STATES, RESTART_BACKOFF_S, TRANSITIONS, Place
from cluster.place import PlaceEvent as E
from cluster.place import PlaceState as S
from kvrelay.lifecycle import IllegalTransitionError

LONG_S = 100.0


def names(value: object) -> str:
    return getattr(value, "name", str(value))


def serving(now_s: float = 0.0) -> Place:
    place = Place()
    place.on(E.LAUNCH, now_s)
    place.on(E.STARTED, now_s)
    return place


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)), ids=names)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    place = Place()
    place.state = state
    before = dict(vars(place))
    if (state, event) in TRANSITIONS:
        place.on(event, 1.0)
        assert place.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            place.on(event, 1.0)
        assert vars(place) == before


def test_a_process_may_end_in_any_state_that_has_one():
    assert {state for state, event in TRANSITIONS if event is E.ENDED} == set(S) - {S.VACANT}


def test_requests_go_where_a_process_serves():
    assert {S.SERVING, S.DRAINING} == OPEN_STATES


def test_the_first_end_is_made_good_at_once_and_the_next_ones_wait_longer_and_longer():
    place, now_s, waits = Place(), 0.0, []
    for _ in range(len(RESTART_BACKOFF_S) + 1):
        place.on(E.LAUNCH, now_s)
        place.on(E.STARTED, now_s)
        place.on(E.ENDED, now_s)
        waits.append(place.due_s - now_s)
        assert place.is_due(place.due_s)
        assert not waits[-1] or not place.is_due(now_s)
        now_s = place.due_s
    assert tuple(waits) == (*RESTART_BACKOFF_S, RESTART_BACKOFF_S[-1])


def test_failed_starts_count_until_one_succeeds():
    place = Place()
    for failed in (1, 2, 3):
        place.on(E.LAUNCH, 0.0)
        place.on(E.ENDED, 0.0)
        assert place.failed_starts == failed
        assert place.due_s == RESTART_BACKOFF_S[failed - 1]
    place.on(E.LAUNCH, 0.0)
    place.on(E.STARTED, 0.0)
    assert place.failed_starts == 0
    place.on(E.ENDED, 0.0)
    assert place.due_s == RESTART_BACKOFF_S[3], "to start and to die is no success"


def test_a_long_life_makes_up_for_everything():
    place = serving()
    place.on(E.ENDED, 0.0)
    place.on(E.LAUNCH, 0.0)
    place.on(E.STARTED, 0.0)
    place.on(E.DRAIN, LONG_S)  # not its start
    place.on(E.ENDED, LONG_S)
    assert place.due_s == LONG_S


@pytest.mark.parametrize("told", [False, True])
def test_who_leaves_on_purpose_has_not_failed(told):
    place = serving()
    place.on(E.ENDED, 0.0)
    place.on(E.LAUNCH, 0.0)
    place.on(E.STARTED, 0.0)
    place.on(E.DRAIN, 0.0)
    place.on(E.DRAINED, 0.0)
    if told:
        place.on(E.TOLD, 0.0)
    place.on(E.ENDED, 1.0)
    assert place.due_s == 1.0
    place.on(E.LAUNCH, 1.0)
    place.on(E.STARTED, 1.0)
    place.on(E.ENDED, 2.0)
    assert place.due_s == 2.0
