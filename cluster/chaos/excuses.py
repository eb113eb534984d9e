"""Owns what a fault excuses: in which times a client may get nothing, and lose its router. Pure.

Called by outcome.py. A SIGKILL excuses the time until the cluster is whole again. A SIGSTOP has to
be noticed: others excuse it no longer than that takes, for there is another process to go on with.
"""

from collections.abc import Collection, Iterable, Sequence

from cluster.chaos.faults import Strike
from cluster.chaos.streams import Window

NOTICED_S = 2.0  # by silence_ms, or by pings that are not answered
AFTER_S = 3.0  # a stream that begins so shortly after a restart is still one that was struck


def spans(strikes: Sequence[Strike], end_s: float, after_s: float = 0.0) -> list[Window]:
    """From each fault until `after_s` after the cluster was whole again; in order and apart."""
    return _joined((strike.at_s, _until(strike, end_s) + after_s) for strike in strikes)


def excused(
    strikes: Sequence[Strike], end_s: float, over: str, alone: Collection[str] = ()
) -> list[Window]:
    """Where a stream over "grpc" or "http" may get nothing; in order and apart. `alone`: roles of
    which there is one process: nobody can go on in its place."""
    found: list[Window] = []
    for strike in strikes:
        until_s = _until(strike, end_s)
        # Over HTTP nobody asks a router whether it is there.
        unheard = strike.role == "router" and over == "http"
        if not strike.stops or strike.role in alone or unheard:
            found.append((strike.at_s, until_s))
            continue
        found.append((strike.at_s, min(until_s, strike.at_s + NOTICED_S)))
        if strike.ended_s is not None:
            found.append((strike.ended_s, until_s))
    return _joined(found)


def router_losses(strikes: Sequence[Strike], end_s: float) -> list[Window]:
    """When a client may find its router gone."""
    return spans([each for each in strikes if each.role == "router"], end_s, AFTER_S)


def _until(strike: Strike, end_s: float) -> float:
    return max(strike.at_s, end_s) if strike.whole_s is None else strike.whole_s


def _joined(windows: Iterable[Window]) -> list[Window]:
    found: list[Window] = []
    for since, to in sorted(windows):
        if found and since <= found[-1][1]:
            found[-1] = (found[-1][0], max(to, found[-1][1]))
        else:
            found.append((since, to))
    return found
