"""What writers may write: each reservation's transfer, its ticket, the blocks that have come.

Used by handoff.py, which decides when a transfer begins to exist and when it is over. The KV links
ask it through decode_worker/book.py.
"""

from collections.abc import Iterator, Sequence

from decode_worker.reservation import Reservation, ReservationEvent, ReservationState
from decode_worker.tickets import TicketSigner
from kvrelay.kv.ledger import BlockEvent, BlockLedger
from kvrelay.transport.errors import RefusedError, Rejection
from kvrelay.wire.transfer_pb2 import Ticket

_WRITING = (ReservationState.RECEIVING, ReservationState.REVOKING)


class Transfers:
    """Of all reservations that are not closed. Times are in ms of any one monotonic clock."""

    def __init__(
        self, ledger: BlockLedger, *, lease_ms: int, resends_max: int, signer: TicketSigner
    ) -> None:
        self._ledger = ledger
        self._lease_ms = lease_ms
        self._resends_max = resends_max
        self._by_id: dict[int, Reservation] = {}
        self._next_id = 1
        self._signer = signer

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._by_id.values())

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def add(self, reservation: Reservation) -> None:
        self._by_id[reservation.transfer_id] = reservation

    def remove(self, reservation: Reservation) -> None:
        del self._by_id[reservation.transfer_id]

    def find(self, transfer_id: int) -> Reservation | None:
        return self._by_id.get(transfer_id)

    def written(self, transfer_id: int) -> Reservation:
        """The reservation, which somebody has leave to write to, or had until it was revoked.

        Raises:
            RefusedError: there is no such transfer any more.
        """
        reservation = self._by_id.get(transfer_id)
        if reservation is None or reservation.state not in _WRITING:
            raise RefusedError(Rejection.STALE, "no such transfer: it has ended")
        return reservation

    def sign(self, reservation: Reservation, ticket: Ticket) -> Ticket:
        """`ticket` with what this reservation gives leave for, signed as a whole."""
        ticket.transfer_id = reservation.transfer_id
        ticket.first_block = reservation.first_block
        ticket.block_ids[:] = reservation.prompt_blocks
        ticket.expires_ms = int(reservation.lease_end_ms)
        reservation.signature = ticket.signature = self._signer.signature(ticket)
        return ticket

    def begin(self, ticket: Ticket, now_ms: float) -> None:
        """Gives the holder of the ticket leave to write, once."""
        reservation = self._by_id.get(ticket.transfer_id)
        self._signer.check(ticket, b"" if reservation is None else reservation.signature)
        if reservation is not None and reservation.state in _WRITING:
            raise RefusedError(Rejection.REPLAYED, "the ticket has been used")
        if ticket.expires_ms <= now_ms:
            raise RefusedError(Rejection.EXPIRED, "the ticket has expired")
        if reservation is None or reservation.state is not ReservationState.RESERVED:
            raise RefusedError(Rejection.STALE, "no such transfer: it has ended")
        reservation.on(ReservationEvent.BEGIN)
        self._ledger.move(reservation.key, reservation.prompt_blocks, BlockEvent.BEGIN)
        reservation.lease_end_ms = now_ms + self._lease_ms

    def expect(
        self, transfer_id: int, first_index: int, count: int, *, again: bool = False
    ) -> Sequence[int]:
        """The pool blocks for these blocks of the ticket, in order and each once, or `again` when
        they were bad.

        Answers for a revoked transfer too: its blocks are in quarantine, and what is already on
        the wire must go somewhere.
        """
        return self.written(transfer_id).expect(first_index, count, again=again)

    def received(
        self,
        transfer_id: int,
        first_index: int,
        count: int,
        bad: Sequence[int],
        now_ms: float,
    ) -> None:
        """These blocks are in the pool, but for the indexes in `bad`, which shall come again.

        Raises:
            RefusedError: one of them came too often.
        """
        reservation = self.written(transfer_id)
        reservation.lease_end_ms = now_ms + self._lease_ms
        reservation.received(first_index, count, bad, self._resends_max)

    def awaits_again(self, transfer_id: int) -> bool:
        """Whether blocks that were bad have not come again yet."""
        return bool(self.written(transfer_id).bad_blocks)
