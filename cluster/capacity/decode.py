"""A simulated decode worker: the production's HandOff, Batch and LocalPrompts, in the place of
whose service this is. Its steps are in steps.py.
"""

from functools import cache
from typing import Any

from cluster.capacity.engine import Host
from cluster.capacity.steps import SimSteps
from cluster.capacity.surroundings import (
    CostWord,
    SimSession,
    Speaker,
    Surroundings,
    info,
)
from decode_worker import messages
from decode_worker.batch import Running
from decode_worker.making import make_handoff
from decode_worker.prompts import LocalPrompt
from decode_worker.reservation import (
    Key,
    Reservation,
    ReservationEvent,
)
from decode_worker.tickets import TicketSigner
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.ledger import BlockLedger
from kvrelay.sessions import Sessions
from kvrelay.wire import transfer_pb2, worker_pb2
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent, FailureCode

_REAP_EVERY_S = 1.0


class NoSigner(TicketSigner):
    """Nobody forges a ticket here, and a signature takes as long as a placement."""

    def signature(self, ticket: transfer_pb2.Ticket) -> bytes:
        return b""

    def check(self, ticket: transfer_pb2.Ticket, given: bytes) -> None:
        """As it was given."""


_SIGNER = NoSigner()


class SimDecode:
    role = "decode"

    def __init__(self, name: str, around: Surroundings, host: Host | None) -> None:
        self.name = name
        self.alive = True
        self._around = around
        config = around.worker
        self.handoff = make_handoff(config, around.layout, BlockLedger(around.kv_blocks), _SIGNER)
        self.steps = SimSteps(around, host, self.handoff, self._send, self._announce_room)
        self._cost = CostWord(self.steps.fit)
        journal = self.handoff.cache.journal
        self._sessions: Sessions[DecodeEvent] = Sessions(
            config,
            journal,
            DecodeEvent,
            self._write_load,
            lambda _, router: SimSession(around, self, router),
        )
        self._speaker = Speaker(around.timeline, self._sessions.announcer, journal)
        self._room = messages.RoomNews(around.kv_blocks)
        self._writers: dict[int, tuple[Any, Any]] = {}  # pushes and their workers, by transfer
        around.timeline.call_later(_REAP_EVERY_S, self._reap)

    def connect(self, router: str) -> SimSession:
        word = info(self._around, self.name, self.steps.prompts.chunk_tokens)
        word.itl_target_ms = self._around.worker.itl_target_ms
        session = self._sessions.open(word, router)
        assert isinstance(session, SimSession)
        return session

    def die(self) -> None:
        """At once. The tokens of the steps that had ended are on their way; prefill workers learn
        it from their links."""
        self.steps.stop()
        self.alive = False
        self._speaker.stop()
        for push, worker in list(self._writers.values()):
            worker.peer_lost(push, f"{self.name} is lost")

    @property
    def is_idle(self) -> bool:
        return not len(self.handoff)

    def check(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self.handoff.cache.check()
        assert not len(self.steps)
        assert not self._writers

    # ---- the routers' side

    def command(self, session: Any, command: DecodeCommand) -> None:
        if not self.alive:
            return
        kind = command.WhichOneof("command")
        if kind == "reserve":
            self._reserve(session, command.reserve)
        elif kind == "cancel":
            self._abort((session, command.cancel.key), ReservationEvent.CANCEL, "cancelled")
        elif kind == "resync":
            self._sessions.announcer.resync(session)

    def _reserve(self, session: Any, reserve: worker_pb2.Reserve) -> None:
        key = (session, reserve.key)
        try:
            reservation = self._reservation(key, reserve)
        except tuple(messages.REFUSALS) as error:
            self._sessions.fail(key, messages.refusal_code(error), str(error))
            return
        self._room.told(self.handoff.ledger.available)
        reserved = worker_pb2.Reserved(key=reserve.key)
        if reserve.prefill_here:
            self.handoff.claim_for_engine(key)
            self._add_prompt(reserve, reservation)
        else:
            ticket = messages.ticket(
                reserve,
                instance_id=self.name,
                layout=None,
                endpoints=(),
                lease_ms=self._around.worker.lease_ms,
            )
            reserved.ticket.CopyFrom(self.handoff.sign(reservation, ticket))
        self._sessions.send(session, DecodeEvent(reserved=reserved))
        if reserve.prefill_here:
            self.steps.prompt_came()

    def _reservation(self, key: Key, reserve: worker_pb2.Reserve) -> Reservation:
        chain = None
        if self._around.worker.prefix_caching:
            chain = messages.prefix_chain(reserve, self._around.layout.block_size)
        if reserve.prefill_here:
            self.steps.prompts.check_room()
        return self.handoff.reserve(
            key,
            reserve.prompt_tokens,
            _sampling(reserve.sampling.max_tokens),
            self._around.now_ms,
            chain,
            prefill_here=reserve.prefill_here,
        )

    def _add_prompt(self, reserve: worker_pb2.Reserve, reservation: Reservation) -> None:
        cached_tokens = reservation.first_block * self._around.layout.block_size
        self.steps.prompts.add(
            LocalPrompt(
                key=reservation.key,
                prompt=range(reserve.prompt_tokens),
                sampling=reservation.sampling,
                blocks=reservation.blocks,
                cached_tokens=cached_tokens,
                computed=cached_tokens,
            )
        )

    # ---- the prefill workers' side

    def begin(self, ticket: transfer_pb2.Ticket, push: Any, worker: Any) -> None:
        """Raises RefusedError."""
        self.handoff.begin(ticket, self._around.now_ms)
        self._writers[ticket.transfer_id] = push, worker

    def received(self, transfer_id: int, first_index: int, count: int) -> None:
        """These blocks are on their way. That they are noted before they are there changes
        nothing: the commit comes after."""
        self.handoff.received(transfer_id, first_index, count, (), self._around.now_ms)

    def committed(self, transfer_id: int, blocks: int, first_token: int) -> None:
        self._writers.pop(transfer_id)
        reservation = self.handoff.commit(transfer_id, blocks)
        if reservation is None:
            return
        sequence = Running(
            key=reservation.key,
            prompt_tokens=reservation.prompt_tokens,
            sampling=reservation.sampling,
            blocks=reservation.blocks,
        )
        self.handoff.share_prompt(sequence.key)
        self.steps.join(sequence, first_token)

    def writer_lost(self, transfer_id: int, reason: str) -> None:
        """The writer is gone, or will write no more."""
        if not self.alive or self._writers.pop(transfer_id, None) is None:
            return
        failed = self.handoff.writer_lost(transfer_id)
        if failed is not None:
            self._sessions.fail(failed.key, FailureCode.FAILURE_CODE_PEER_LOST, reason)
        self._announce_room()

    # ---- letting go

    def _abort(self, key: Key, why: ReservationEvent, reason: str) -> None:
        transfer_id = self.steps.let_go(key, why)
        writer = self._writers.get(transfer_id) if transfer_id is not None else None
        if writer is not None:
            push, worker = writer
            worker.peer_lost(push, reason)

    def _send(self, session: Any, event: DecodeEvent) -> None:
        self._sessions.send(session, event)

    def _reap(self) -> None:
        if not self.alive:
            return
        for key in self.handoff.expired(self._around.now_ms):
            self._abort(key, ReservationEvent.TIMEOUT, "its lease ran out")
            self._sessions.fail(
                key, FailureCode.FAILURE_CODE_EXPIRED, "no progress within the lease"
            )
        self._around.timeline.call_later(_REAP_EVERY_S, self._reap)

    def _announce_room(self) -> None:
        if self._room.grew(self.handoff.ledger.available):
            self._sessions.tell_load()

    def _write_load(self, load: worker_pb2.DecodeLoad) -> None:
        steps = self.steps
        messages.write_load(load, self.handoff, steps.batch, steps.prompts, self._cost())


@cache
def _sampling(max_tokens: int) -> SamplingParams:
    """Every answer is as long as was asked for."""
    return SamplingParams(0.0, 0, 1.0, 0, max_tokens, frozenset())
