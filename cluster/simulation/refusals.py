"""Which refusals are right, and why. Any other is a request that was lost.

A refusal needs a cause: the router's own reckoning must give it, and the faults until then must be
able to have caused it.
"""

from cluster.simulation.clients import Client
from cluster.simulation.faults import Faults
from cluster.simulation.routers import Refused
from cluster.simulation.settings import Settings


class Refusals:
    def __init__(self, settings: Settings, faults: Faults) -> None:
        self._router = settings.router
        self._faults = faults

    def wrong(self, client: Client, refused: Refused) -> str:
        """What is wrong with this one; "" when it is right."""
        match refused.kind:
            case "QueueFullError":
                return self._at_the_door(client) or ("" if refused.queue_full else "with room")
            case "DeadlineError":
                return self._at_the_door(client) or _without_deadline(client)
            case "ExhaustedTrouble":
                return self._exhausted(client, refused)
            case "UnavailableTrouble":
                return self._unavailable(refused)
            case "PoisonTrouble":
                return self._poison()
        return "which is never right"

    def _at_the_door(self, client: Client) -> str:
        return "at the door, though it was accepted" if _has_begun(client) else ""

    def _exhausted(self, client: Client, refused: Refused) -> str:
        """Its wait was over. One that has begun waits only when something has failed it, and has
        met its deadline."""
        if client.seen and not self._faults.happened:
            return "and no fault has happened"
        if refused.waited_ms >= self._router.queue_wait_ms:
            return ""
        return _without_deadline(client) or ("too soon" if _has_begun(client) else "")

    def _unavailable(self, refused: Refused) -> str:
        """Deaths do not count: it may lose any number of workers."""
        if refused.failed < self._router.attempts_max:
            return f"after {refused.failed} failures of {self._router.attempts_max}"
        could = self._faults.failures
        return "" if could >= self._router.attempts_max else f"faults can have failed it {could}x"

    def _poison(self) -> str:
        struck = len(self._faults.struck)
        return "" if struck >= self._router.strikes_max else f"{struck} workers were struck"


def _has_begun(client: Client) -> bool:
    """At the router that has it; one that nobody had kept is as new there."""
    return bool(client.seen) and not client.asked_anew


def _without_deadline(client: Client) -> str:
    return "" if client.ask.ttft_deadline_ms else "too soon, and it has no deadline"
