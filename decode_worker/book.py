"""What the KV links may ask of a decode worker: the hand-off with the clock added."""

from collections.abc import Callable, Sequence

from decode_worker.handoff import HandOff
from kvrelay.failpoints import Failpoints, Point
from kvrelay.wire.transfer_pb2 import Ticket


class Book:
    """The TransferBook of kvrelay/transport/reader.py. `commit` and `lost` are the service's: they
    concern more than the hand-off."""

    def __init__(
        self,
        handoff: HandOff,
        now_ms: Callable[[], float],
        commit: Callable[[int, int, int], None],
        lost: Callable[[int, str], None],
        failpoints: Failpoints,
    ) -> None:
        self._handoff = handoff
        self._now_ms = now_ms
        self._failpoints = failpoints
        self.expect = handoff.expect
        self.awaits_again = handoff.awaits_again
        self.commit = commit
        self.lost = lost

    def begin(self, ticket: Ticket) -> None:
        self._failpoints.hit(Point.DECODE_BEGIN)
        self._handoff.begin(ticket, self._now_ms())

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        self._handoff.received(transfer_id, first_index, count, bad, self._now_ms())
        self._failpoints.hit(Point.DECODE_RECEIVED)
