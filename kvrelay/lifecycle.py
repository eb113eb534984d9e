"""How a lifecycle is written down: an enum of states, an enum of events, and one table.

Used by the request (router), the job (prefill worker) and the reservation (decode worker). What the
table does not have raises and changes nothing.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class IllegalTransitionError(Exception):
    """A bug in the caller: an event that the table does not have for this state."""


def advance(table: Mapping[tuple[State, Event], State], state: State, event: Event) -> State:
    """The state after `event`."""
    target = table.get((state, event))
    if target is None:
        raise IllegalTransitionError(f"{event.name} while {state.name}")
    return target
