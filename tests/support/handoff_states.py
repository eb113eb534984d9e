"""A decode worker's HandOff, and reservations in each of their states."""

import contextlib
from collections.abc import Iterator

from kv_fixtures import LAYOUT, sampling

from decode_worker.handoff import HandOff
from decode_worker.reservation import Reservation, ReservationEvent, ReservationState
from kvrelay.kv.ledger import BlockLedger, BlockState
from kvrelay.wire.transfer_pb2 import Ticket

TOTAL = 8  # blocks
LEASE_MS = 100
RESENDS_MAX = 2
PROMPT = 8  # tokens; two blocks, and one more for the answer


@contextlib.contextmanager
def hand_off() -> Iterator[HandOff]:
    """Whatever is left behind is let go of at the end; then every block must be free."""
    ledger = BlockLedger(TOTAL)
    handoff = HandOff(
        LAYOUT, ledger, lease_ms=LEASE_MS, reservations_max=4, resends_max=RESENDS_MAX
    )
    yield handoff
    handoff.cache.check()
    for reservation in list(handoff._by_key.values()):
        handoff.abort(reservation.key, ReservationEvent.CANCEL, in_step=True)
        handoff.writer_lost(reservation.transfer_id)
        if handoff.is_aborting(reservation.key):
            handoff.engine_idle(reservation.key)
    handoff.cache.check()
    assert ledger.available == TOTAL
    assert len(handoff) == 0


def reserve(
    handoff: HandOff, number: int = 1, prompt: int = PROMPT, answer: int = 2, now: float = 0
) -> Reservation:
    return handoff.reserve(("router", number), prompt, sampling(max_tokens=answer), now)


def begin(handoff: HandOff, reservation: Reservation, now: float = 0) -> None:
    handoff.begin(handoff.sign(reservation, Ticket()), now)


def receive(handoff: HandOff, reservation: Reservation, now: float = 0) -> None:
    """All blocks of the prompt, one by one."""
    for index in range(len(reservation.prompt_blocks)):
        handoff.expect(reservation.transfer_id, index, 1)
        handoff.received(reservation.transfer_id, reservation.blocks_received, 1, (), now)


def brought_to(handoff: HandOff, state: ReservationState, number: int = 1) -> Reservation:
    """ABORTING: during a step."""
    reservation = reserve(handoff, number)
    if state is ReservationState.PREFILLING:
        handoff.claim_for_engine(reservation.key)
    elif state is not ReservationState.RESERVED:
        begin(handoff, reservation)
    if state in (ReservationState.DECODING, ReservationState.ABORTING):
        receive(handoff, reservation)
        handoff.commit(reservation.transfer_id, len(reservation.prompt_blocks))
    if state in (ReservationState.REVOKING, ReservationState.ABORTING):
        handoff.abort(reservation.key, ReservationEvent.CANCEL, in_step=True)
    assert reservation.state is state
    return reservation


def counts(handoff: HandOff) -> dict[BlockState, int]:
    return {state: n for state, n in handoff.ledger.counts().items() if n}
