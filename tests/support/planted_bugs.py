"""Bugs of the kinds that peers of kvrelay have had, planted in production objects.

Each changes one decision, by patching it. tests/simulation/test_planted.py shows that the
simulation finds every one of them.
"""

from collections.abc import Callable
from typing import Any

from decode_worker import messages
from decode_worker.handoff import HandOff
from decode_worker.kept import Kept
from decode_worker.reservation import ReservationState
from decode_worker.service import DecodeService
from decode_worker.transfers import Transfers
from kvrelay.kv import prefix
from kvrelay.kv.ledger import BlockEvent, BlockLedger, BlockState
from kvrelay.kv.prefix_cache import PrefixCache
from prefill_worker.schedule import JobState, Schedule
from router import commands, request
from router.answer import Answer
from router.attempts import Attempts
from router.queue import WaitingQueue
from router.recovery import Recovery

Plant = Callable[[Any], None]


def blocks_are_free_at_once_when_a_transfer_is_aborted(patch: Any) -> None:
    """No quarantine: they are given to others while the writer still writes."""
    abort = HandOff.abort

    def without_quarantine(self: HandOff, key: Any, *args: Any, **settings: Any) -> Any:
        reservation = self._by_key.get(key)
        transfer_id = abort(self, key, *args, **settings)
        if transfer_id is not None and reservation is not None:
            blocks = reservation.prompt_blocks
            self.ledger.move(key, blocks, BlockEvent.WRITER_GONE)
            reservation.blocks = []
            reservation.first_block = reservation.prompt_end = 0
        return transfer_id

    patch.setattr(HandOff, "abort", without_quarantine)
    patch.setattr(Transfers, "expect", _any_blocks(Transfers.expect))


def _any_blocks(expect: Any) -> Any:
    """What a writer had leave for once, it writes to."""
    known: dict[tuple[int, int], list[int]] = {}

    def blocks(self: Any, transfer_id: int, first: int, count: int, *, again: bool = False) -> Any:
        reservation = self._by_id[transfer_id]
        if reservation.state is ReservationState.RECEIVING:
            known[id(self), transfer_id] = reservation.prompt_blocks
            return expect(self, transfer_id, first, count, again=again)
        return known.get((id(self), transfer_id), [])[first : first + count]

    return blocks


def a_step_under_way_keeps_nothing_in_quarantine(patch: Any) -> None:
    """What the engine still writes is free as soon as its request is cancelled."""
    abort = HandOff.abort

    def never_in_step(self: HandOff, *args: Any, in_step: bool = False, **settings: Any) -> Any:
        return abort(self, *args, **settings)

    patch.setattr(HandOff, "abort", never_in_step)


def a_prefill_worker_frees_what_it_still_computes(patch: Any) -> None:
    abort, quiet = Schedule.abort, Schedule.quiet

    def at_once(self: Schedule, *args: Any, **settings: Any) -> Any:
        job = abort(self, *args, **settings)
        if job is not None and job.state is JobState.ABORTING:
            self.cache.let_go(job.key, job.blocks, BlockEvent.WRITER_GONE, job.hashes)
        return job

    def later(self: Schedule, job: Any) -> None:
        job.blocks, job.hashes = [], ()
        quiet(self, job)

    patch.setattr(Schedule, "abort", at_once)
    patch.setattr(Schedule, "quiet", later)


def blocks_of_a_cancelled_prompt_are_leaked(patch: Any) -> None:
    def quiet(self: Schedule, job: Any) -> None:
        del self._jobs[job.key]

    patch.setattr(Schedule, "quiet", quiet)


def a_commit_is_accepted_before_its_blocks_are_there(patch: Any) -> None:
    reservation = HandOff.commit.__globals__["Reservation"]
    patch.setattr(reservation, "missing_blocks", property(lambda self: 0))
    patch.setattr(Transfers, "awaits_again", lambda self, transfer_id: False)


def a_wrong_checksum_is_overlooked(patch: Any) -> None:
    received = Transfers.received

    def all_well(
        self: Transfers, transfer_id: int, first: int, count: int, bad: Any, now_ms: float
    ) -> None:
        received(self, transfer_id, first, count, (), now_ms)

    patch.setattr(Transfers, "received", all_well)


def a_first_token_is_appended_twice(patch: Any) -> None:
    """Both workers name it."""

    def log(self: Any, offset: int, tokens: Any, now_ms: float) -> list[int]:
        self.answer.extend(tokens)
        self.times.first_token_at_ms = self.times.first_token_at_ms or now_ms
        self.times.last_token_at_ms = now_ms
        return list(tokens)

    patch.setattr(request.Request, "log", log)


def a_reader_that_is_behind_misses_tokens(patch: Any) -> None:
    async def next_one(self: Answer) -> Any:
        event = await whole(self)
        return event[-1:] if isinstance(event, list) else event

    whole = Answer.next
    patch.setattr(Answer, "next", next_one)


def a_retry_does_not_cancel_what_was_before(patch: Any) -> None:
    def withdraw(self: Attempts, asked: Any, refused_by: str = "") -> list[Any]:
        self.release(asked)
        return []

    patch.setattr(Attempts, "withdraw", withdraw)


def a_retry_forgets_the_answer_so_far(patch: Any) -> None:
    patch.setattr(request.Request, "prompt_now", property(lambda self: list(self.prompt)))
    patch.setattr(request.Request, "prompt_tokens_now", property(lambda self: len(self.prompt)))


def a_retry_does_not_say_what_was_answered(patch: Any) -> None:
    """Penalties then count from nothing."""
    reserve, prefill = commands.reserve, commands.prefill

    def silent(make: Any, field: str) -> Any:
        def made(*args: Any) -> Any:
            told = make(*args)
            getattr(told.command, field).answered = 0
            return told

        return made

    patch.setattr("router.attempts.reserve", silent(reserve, "reserve"))
    patch.setattr("router.dispatcher.prefill", silent(prefill, "prefill"))


def a_cached_block_is_evicted_while_it_is_read(patch: Any) -> None:
    take, target = PrefixCache.take, BlockLedger._target

    def still_unused(self: PrefixCache, owner: Any, hashes: Any, *args: Any, **settings: Any):
        taken = take(self, owner, hashes, *args, **settings)
        for block in taken[0]:
            self._unused.setdefault(block, None)
        return taken

    def by_anybody(self: BlockLedger, owner: Any, block: int, event: BlockEvent) -> BlockState:
        if event is BlockEvent.EVICT:
            self._held[block] = self._held[block][0], ()
            return BlockState.FREE
        return target(self, owner, block, event)

    patch.setattr(PrefixCache, "take", still_unused)
    patch.setattr(BlockLedger, "_target", by_anybody)
    patch.setattr(PrefixCache, "check", lambda self: None)


def tenants_share_their_prefixes(patch: Any) -> None:
    root = prefix.chain_root

    def unsalted(model_fingerprint: str, block_size: int, salt: str) -> bytes:
        return root(model_fingerprint, block_size, "")

    patch.setattr("router.request.chain_root", unsalted)


def names_of_blocks_collide(patch: Any) -> None:
    """Four bits of the hash are left."""

    def extend(self: Any, tokens: Any) -> None:
        before = len(self.hashes)
        right(self, tokens)
        self.hashes[before:] = [bytes([h[0] & 15]) * len(h) for h in self.hashes[before:]]

    right = prefix.PrefixChain.extend
    patch.setattr(prefix.PrefixChain, "extend", extend)


def the_block_of_the_last_prompt_token_is_shared_and_written(patch: Any) -> None:
    def whole(self: HandOff, prompt_tokens: int) -> int:
        return prompt_tokens // self._layout.block_size

    def before_last(*args: Any) -> Any:
        prompt = local_prompt(*args)
        prompt.computed = prompt.cached_tokens = min(prompt.computed, len(prompt.prompt) - 1)
        return prompt

    local_prompt = messages.local_prompt
    patch.setattr(HandOff, "_before_last_token", whole)
    patch.setattr(messages, "local_prompt", before_last)


def the_end_of_a_session_forgets_a_reservation(patch: Any) -> None:
    ended = HandOff.session_ended

    def but_one(self: HandOff, session: Any) -> Any:
        to_abort, decoding = ended(self, session)
        return to_abort[1:], decoding

    patch.setattr(HandOff, "session_ended", but_one)
    patch.setattr(HandOff, "expired", lambda self, now_ms: [])


def somebody_waits_in_the_queue_for_ever(patch: Any) -> None:
    """Low priority is never looked at, and its wait has no end."""
    heads = WaitingQueue.heads

    def urgent(self: WaitingQueue) -> list[Any]:
        return [waiting for waiting in heads(self) if waiting.priority <= 0]

    patch.setattr(WaitingQueue, "heads", urgent)
    for place in ("router.dispatcher", "router.recovery"):
        patch.setattr(f"{place}.wait_is_over", lambda *_: "", raising=False)


def a_refusal_is_not_told_and_reserve_has_no_deadline(patch: Any) -> None:
    reserve, expire = DecodeService._reserve, Recovery.expire

    def silently(self: DecodeService, session: Any, wish: Any) -> None:
        fail = self._sessions.fail
        self._sessions.fail = lambda *_: None  # type: ignore[method-assign]
        try:
            reserve(self, session, wish)
        finally:
            self._sessions.fail = fail  # type: ignore[method-assign]

    def never(self: Recovery, now_ms: float) -> Any:
        before = self._config
        self._config = before.model_copy(update={"reserve_ms": float("inf")})
        try:
            return expire(self, now_ms)
        finally:
            self._config = before

    patch.setattr(DecodeService, "_reserve", silently)
    patch.setattr(Recovery, "expire", never)


def a_block_becomes_free_twice(patch: Any) -> None:
    move = BlockLedger.move

    def twice(self: BlockLedger, owner: Any, blocks: Any, event: BlockEvent) -> None:
        move(self, owner, blocks, event)
        if event is BlockEvent.WRITER_GONE:
            self._free.extend(blocks)

    patch.setattr(BlockLedger, "move", twice)


def _ending_with(trouble: Callable[[], commands.Trouble]) -> Any:
    """In the place of Recovery._again: nothing is placed twice."""

    def at_once(self: Recovery, asked: Any, event: Any, queued_at_ms: float) -> Any:
        withdrawn = self._attempts.withdraw(asked)
        ending = asked.complete()
        if ending is not None:
            return withdrawn + self._requests.finish(asked, ending)
        return withdrawn + self._requests.fail(asked, trouble())

    return at_once


def a_lost_request_is_failed_and_not_placed_again(patch: Any) -> None:
    patch.setattr(Recovery, "_again", _ending_with(lambda: commands.UnavailableTrouble("lost")))


def a_lost_request_ends_as_if_nobody_had_room(patch: Any) -> None:
    patch.setattr(Recovery, "_again", _ending_with(lambda: commands.ExhaustedTrouble("lost")))


def a_lost_request_ends_as_if_workers_died_of_it(patch: Any) -> None:
    patch.setattr(Recovery, "_again", _ending_with(lambda: commands.PoisonTrouble("lost")))


def an_acknowledgement_does_nothing(patch: Any) -> None:
    """Whole answers are kept for ever."""
    patch.setattr(Kept, "acknowledge", lambda self, session, numbers: None)


PLANTS: tuple[Plant, ...] = (
    blocks_are_free_at_once_when_a_transfer_is_aborted,
    a_step_under_way_keeps_nothing_in_quarantine,
    a_prefill_worker_frees_what_it_still_computes,
    blocks_of_a_cancelled_prompt_are_leaked,
    a_commit_is_accepted_before_its_blocks_are_there,
    a_wrong_checksum_is_overlooked,
    a_first_token_is_appended_twice,
    a_reader_that_is_behind_misses_tokens,
    a_retry_does_not_cancel_what_was_before,
    a_retry_forgets_the_answer_so_far,
    a_retry_does_not_say_what_was_answered,
    a_cached_block_is_evicted_while_it_is_read,
    tenants_share_their_prefixes,
    names_of_blocks_collide,
    the_block_of_the_last_prompt_token_is_shared_and_written,
    the_end_of_a_session_forgets_a_reservation,
    somebody_waits_in_the_queue_for_ever,
    a_refusal_is_not_told_and_reserve_has_no_deadline,
    a_block_becomes_free_twice,
    a_lost_request_is_failed_and_not_placed_again,
    a_lost_request_ends_as_if_nobody_had_room,
    a_lost_request_ends_as_if_workers_died_of_it,
    an_acknowledgement_does_nothing,
)
