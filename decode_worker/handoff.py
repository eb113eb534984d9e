"""Reservations of a decode worker: from leave to write until the last block is free again.

A pure object: events in, answers out, no clock and no socket. decode_worker/service.py calls it
from its event loop and carries out what it answers. It is the only caller of the prefix cache and
of the block ledger under it.
"""

import math
from collections import Counter
from collections.abc import Sequence

from decode_worker.claims import Claims
from decode_worker.reservation import (
    CAUSES,
    InvalidReservationError,
    Key,
    Reservation,
    ReservationEvent,
    ReservationState,
)
from decode_worker.tickets import TicketSigner
from decode_worker.transfers import Transfers
from kvrelay.draining import DrainingError
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.layout import KVLayout, reserved_blocks
from kvrelay.kv.ledger import BlockEvent, BlockLedger, OutOfBlocksError
from kvrelay.kv.prefix import PrefixChain
from kvrelay.kv.prefix_cache import PrefixCache
from kvrelay.transport.errors import RefusedError, Rejection

_LETTING_GO = (ReservationState.REVOKING, ReservationState.ABORTING)


class HandOff:
    """All reservations of one worker. Times are in ms of any one monotonic clock."""

    def __init__(
        self,
        layout: KVLayout,
        ledger: BlockLedger,
        *,
        lease_ms: int,
        reservations_max: int,
        resends_max: int,
        claims: Claims | None = None,
        signer: TicketSigner | None = None,
    ) -> None:
        self.ledger = ledger
        self.cache = PrefixCache(ledger)
        self.draining = False
        self.causes: Counter[ReservationEvent] = Counter()  # why reservations were let go of
        self._layout = layout
        self._lease_ms = lease_ms
        self._reservations_max = reservations_max
        self._claims = Claims() if claims is None else claims
        self._by_key: dict[Key, Reservation] = {}
        self._engine_lease_end_ms = 0.0
        transfers = Transfers(
            ledger, lease_ms=lease_ms, resends_max=resends_max, signer=signer or TicketSigner()
        )
        self._transfers = transfers
        self.sign, self.begin = transfers.sign, transfers.begin
        self.expect, self.received = transfers.expect, transfers.received
        self.awaits_again = transfers.awaits_again

    def __len__(self) -> int:
        return len(self._by_key)

    def reserve(
        self,
        key: Key,
        prompt_tokens: int,
        sampling: SamplingParams,
        now_ms: float,
        chain: PrefixChain | None = None,
        *,
        prefill_here: bool = False,
    ) -> Reservation:
        """Blocks for prompt and answer, all or nothing: a request that runs never waits for more.

        chain: over the whole prompt; what is cached of it is shared, not reserved.
        prefill_here: the engine needs the logits of the prompt's last token, so it writes that
            token's block, which must be private.

        Raises:
            DrainingError: nothing new is taken here.
            OutOfBlocksError: no room now, or it is kept for others, or too many reservations.
            InvalidReservationError: no room ever.
        """
        if self.draining:
            raise DrainingError("this worker is draining: it takes nothing new")
        total = reserved_blocks(prompt_tokens, sampling.max_tokens, self._layout.block_size)
        if total > self.ledger.total:
            raise InvalidReservationError(
                f"{prompt_tokens} prompt tokens and {sampling.max_tokens} more need {total} KV "
                f"blocks; this worker has {self.ledger.total}"
            )
        if chain is not None and len(chain) != prompt_tokens:
            raise InvalidReservationError(
                f"block hashes for {len(chain)} tokens, not for {prompt_tokens}"
            )
        if key in self._by_key:
            raise InvalidReservationError("this request attempt has a reservation already")
        if len(self._by_key) >= self._reservations_max:
            raise OutOfBlocksError(f"{self._reservations_max} reservations are open")
        reusable = chain.hashes if chain is not None else []
        if prefill_here:
            reusable = reusable[: self._before_last_token(prompt_tokens)]
        cached, private = self._take(key, reusable, total, now_ms)
        reservation = Reservation(
            key=key,
            transfer_id=self._transfers.new_id(),
            prompt_tokens=prompt_tokens,
            sampling=sampling,
            blocks=cached + private,
            first_block=len(cached),
            prompt_end=self._layout.blocks_for(prompt_tokens),
            lease_end_ms=now_ms + self._lease_ms,
            chain=chain,
        )
        self._by_key[key] = reservation
        self._transfers.add(reservation)
        return reservation

    def _take(
        self, key: Key, hashes: Sequence[bytes], total: int, now_ms: float
    ) -> tuple[list[int], list[int]]:
        """PrefixCache.take, in turn with the large requests of other routers."""
        session = key[0]
        kept = self._claims.kept(session, now_ms)
        try:
            taken = self.cache.take(key, hashes, total, keep=kept)
        except OutOfBlocksError:
            if not kept or total > self.ledger.available:  # not only because of another's claim
                self._claims.refused(session, total, now_ms)
            raise
        self._claims.granted(session, total)
        return taken

    def session_ended(self, session: object) -> list[Key]:
        """A router is lost: it claims nothing any more. Returns what is to be aborted with
        ROUTER_LOST; what is decoding goes on for another router."""
        self._claims.leave(session)
        to_abort = []
        for key, reservation in self._by_key.items():
            if key[0] is not session:
                continue
            if reservation.state is ReservationState.DECODING:
                reservation.on(ReservationEvent.ROUTER_LOST)
            else:
                to_abort.append(key)
        return to_abort

    def drain(self) -> None:
        """Nothing new from here on; what is here goes on."""
        self.draining = True
        for reservation in self._by_key.values():
            reservation.on(ReservationEvent.DRAIN)

    def commit(self, transfer_id: int, blocks: int) -> Reservation | None:
        """The reservation, now decoding; None when it was let go of meanwhile."""
        reservation = self._transfers.written(transfer_id)
        if reservation.state is ReservationState.REVOKING:
            return None
        missing = reservation.missing_blocks
        if missing or blocks != reservation.ticket_blocks:
            text = f"Commit of {blocks} blocks while {missing} are missing"
            raise RefusedError(Rejection.INCOMPLETE, text)
        reservation.on(ReservationEvent.COMMIT)
        self.ledger.move(reservation.key, reservation.prompt_blocks, BlockEvent.COMMIT)
        self.ledger.move(reservation.key, reservation.growth_blocks, BlockEvent.CLAIM)
        return reservation

    def writer_lost(self, transfer_id: int) -> Reservation | None:
        """The writer will write no more. The reservation if that is news and it has failed."""
        reservation = self._transfers.find(transfer_id)
        if reservation is None:
            return None
        failed = reservation.state is ReservationState.RECEIVING
        reservation.on(ReservationEvent.WRITER_LOST)
        if failed:
            self.causes[ReservationEvent.WRITER_LOST] += 1
            self._release_unwritten(reservation)
        if reservation.state is ReservationState.CLOSED:
            self.ledger.move(reservation.key, reservation.prompt_blocks, BlockEvent.WRITER_GONE)
            self._forget(reservation)
        return reservation if failed else None

    def claim_for_engine(self, key: Key) -> None:
        """There will be no writer: the prompt is for the engine here."""
        reservation = self._by_key[key]
        reservation.on(ReservationEvent.PREFILL)
        blocks = reservation.prompt_blocks + reservation.growth_blocks
        self.ledger.move(key, blocks, BlockEvent.CLAIM)

    def catch_up(self, key: Key, computed: int) -> int:
        """Between steps: takes what others have computed of a prompt that is computed here, from
        its first `computed` tokens on, which end with a block. Returns how many tokens."""
        reservation, size = self._by_key[key], self._layout.block_size
        end = min(len(reservation.hashes), self._before_last_token(reservation.prompt_tokens))
        places = range(computed // size, end)
        hashes = reservation.hashes
        return self.cache.catch_up(key, reservation.blocks, hashes, places) * size

    def computed(self, key: Key) -> None:
        """The whole prompt is: the reservation is decoding."""
        self._by_key[key].on(ReservationEvent.COMPUTED)

    def share_prompt(self, key: Key, tokens: int | None = None) -> None:
        """The engine can read the KV of the prompt, or of its first `tokens`: from now on others
        may share its full blocks."""
        reservation = self._by_key[key]
        full = len(reservation.hashes)
        if tokens is not None:
            full = min(full, tokens // self._layout.block_size)
        first, reservation.shared_blocks = reservation.shared_blocks, full
        self.cache.insert(key, reservation.blocks, reservation.hashes, first=first, end=full)

    def distrust(self, key: Key) -> None:
        """What the engine made of this sequence is wrong: nobody else shall read its KV."""
        reservation = self._by_key.get(key)
        if reservation is not None:
            self.cache.forget(reservation.hashes)
            reservation.chain = None

    def finish(self, key: Key, answer: Sequence[int] = ()) -> None:
        """The answer is complete, and no step with this sequence is running."""
        reservation = self._by_key[key]
        reservation.on(ReservationEvent.FINISH)
        self._keep_answer(reservation, answer)
        self.cache.let_go(key, reservation.blocks, BlockEvent.RELEASE, reservation.hashes)
        self._forget(reservation)

    def abort(
        self, key: Key, why: ReservationEvent, answer: Sequence[int] = (), *, in_step: bool = False
    ) -> int | None:
        """Lets go of a reservation in any state; one that is unknown has ended already.

        Blocks that somebody may still write go to quarantine: with a writer, until writer_lost;
        with the engine (`in_step`), until engine_idle. What is cached is kept for others, with
        the `answer` so far.

        why: one of CAUSES.

        Returns the transfer whose writer must be told, if there is one.
        """
        assert why in CAUSES, why
        reservation = self._by_key.get(key)
        if reservation is None:
            return None
        before = reservation.state
        reservation.on(why)
        if reservation.state is before:
            return None
        self.causes[why] += 1
        if before is ReservationState.RESERVED:
            self.cache.let_go(key, reservation.blocks, BlockEvent.RELEASE, reservation.hashes)
            self._forget(reservation)
            return None
        if before is ReservationState.RECEIVING:
            self.ledger.move(key, reservation.prompt_blocks, BlockEvent.ABORT)
            self._release_unwritten(reservation)
            return reservation.transfer_id
        self._keep_answer(reservation, answer)
        self.ledger.move(key, self.cache.private(reservation.blocks), BlockEvent.ABORT)
        if not in_step:
            self.engine_idle(key)
        return None

    def engine_idle(self, key: Key) -> None:
        """The engine will not write this aborted sequence's blocks again."""
        reservation = self._by_key[key]
        reservation.on(ReservationEvent.ENGINE_IDLE)
        self.cache.let_go(key, reservation.blocks, BlockEvent.WRITER_GONE, reservation.hashes)
        self._forget(reservation)

    def is_aborting(self, key: Key) -> bool:
        reservation = self._by_key.get(key)
        return reservation is not None and reservation.state in _LETTING_GO

    def engine_moved(self, now_ms: float) -> None:
        """A step has ended: prompts that wait for their turn here need not give up."""
        self._engine_lease_end_ms = now_ms + self._lease_ms

    def expired(self, now_ms: float) -> list[Key]:
        """Reservations that wait for a writer, or for the engine to compute their prompt, and have
        made no progress within their lease."""
        return [
            key
            for key, reservation in self._by_key.items()
            if self._lease_end_ms(reservation) <= now_ms
        ]

    def _lease_end_ms(self, reservation: Reservation) -> float:
        if reservation.state in (ReservationState.RESERVED, ReservationState.RECEIVING):
            return reservation.lease_end_ms
        if reservation.state is ReservationState.PREFILLING:
            return max(reservation.lease_end_ms, self._engine_lease_end_ms)
        return math.inf

    def _before_last_token(self, prompt_tokens: int) -> int:
        """Blocks of the prompt that the engine need not write when it computes the last token."""
        return (prompt_tokens - 1) // self._layout.block_size

    def _release_unwritten(self, reservation: Reservation) -> None:
        """What the prefill worker has no leave to write, nor the engine yet."""
        blocks = reservation.cached_blocks + reservation.growth_blocks
        self.cache.let_go(reservation.key, blocks, BlockEvent.RELEASE, reservation.hashes)

    def _keep_answer(self, reservation: Reservation, answer: Sequence[int]) -> None:
        """Caches the blocks that the answer has filled. The newest token's KV is not in the pool
        yet, and where a running step puts it is in no full block."""
        if reservation.chain is None or not answer:
            return
        reservation.chain.extend(answer[:-1])
        self.cache.insert(reservation.key, reservation.blocks, reservation.hashes)

    def _forget(self, reservation: Reservation) -> None:
        del self._by_key[reservation.key]
        self._transfers.remove(reservation)
