"""One reservation of a decode worker and its lifecycle: every state, event and legal transition.

decode_worker/handoff.py owns all of them and is the only one who changes them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.prefix import PrefixChain
from kvrelay.lifecycle import advance
from kvrelay.transport.errors import RefusedError, Rejection


class ReservationState(Enum):
    __hash__ = object.__hash__  # in C: every event looks both up

    RESERVED = "reserved"  # blocks promised, no writer yet
    RECEIVING = "receiving"  # a writer has leave to write
    PREFILLING = "prefilling"  # the engine here computes the prompt, or will when its turn comes
    DECODING = "decoding"  # the prompt's KV is complete
    REVOKING = "revoking"  # not wanted, but the writer has not let go
    ABORTING = "aborting"  # not wanted, but the engine has not let go
    CLOSED = "closed"


class ReservationEvent(Enum):
    __hash__ = object.__hash__

    BEGIN = "begin"  # a writer has shown its ticket
    COMMIT = "commit"  # every block is in and checked
    PREFILL = "prefill"  # no writer: the prompt is for the engine here
    COMPUTED = "computed"  # the prompt, by the engine here
    FINISH = "finish"  # the answer is complete
    CANCEL = "cancel"  # its router does not want it any more
    TIMEOUT = "timeout"  # its lease ran out, or no router came for its answer
    ROUTER_LOST = "router lost"  # its router's session ended
    WRITER_LOST = "writer lost"  # the writer let go, or its link ended
    FAIL = "fail"  # the engine could not do it
    ENGINE_IDLE = "engine idle"  # the step that was running has ended
    DRAIN = "drain"  # this worker takes nothing new from here on


_S, _E = ReservationState, ReservationEvent

TRANSITIONS: dict[tuple[ReservationState, ReservationEvent], ReservationState] = {
    (_S.RESERVED, _E.BEGIN): _S.RECEIVING,
    (_S.RESERVED, _E.PREFILL): _S.PREFILLING,
    (_S.RESERVED, _E.CANCEL): _S.CLOSED,
    (_S.RESERVED, _E.TIMEOUT): _S.CLOSED,
    (_S.RESERVED, _E.ROUTER_LOST): _S.CLOSED,
    (_S.RESERVED, _E.WRITER_LOST): _S.RESERVED,  # nobody has begun
    (_S.RESERVED, _E.DRAIN): _S.RESERVED,
    (_S.RECEIVING, _E.COMMIT): _S.DECODING,
    (_S.RECEIVING, _E.CANCEL): _S.REVOKING,
    (_S.RECEIVING, _E.TIMEOUT): _S.REVOKING,
    (_S.RECEIVING, _E.ROUTER_LOST): _S.REVOKING,
    (_S.RECEIVING, _E.WRITER_LOST): _S.CLOSED,
    (_S.RECEIVING, _E.DRAIN): _S.RECEIVING,
    (_S.PREFILLING, _E.COMPUTED): _S.DECODING,
    (_S.PREFILLING, _E.CANCEL): _S.ABORTING,
    (_S.PREFILLING, _E.TIMEOUT): _S.ABORTING,
    (_S.PREFILLING, _E.ROUTER_LOST): _S.ABORTING,
    (_S.PREFILLING, _E.WRITER_LOST): _S.PREFILLING,  # there is none
    (_S.PREFILLING, _E.FAIL): _S.ABORTING,
    (_S.PREFILLING, _E.DRAIN): _S.PREFILLING,
    (_S.DECODING, _E.FINISH): _S.CLOSED,
    (_S.DECODING, _E.CANCEL): _S.ABORTING,
    (_S.DECODING, _E.TIMEOUT): _S.ABORTING,
    (_S.DECODING, _E.ROUTER_LOST): _S.DECODING,  # another one may adopt it
    (_S.DECODING, _E.WRITER_LOST): _S.DECODING,  # it has written all
    (_S.DECODING, _E.FAIL): _S.ABORTING,
    (_S.DECODING, _E.DRAIN): _S.DECODING,
    (_S.REVOKING, _E.CANCEL): _S.REVOKING,
    (_S.REVOKING, _E.TIMEOUT): _S.REVOKING,
    (_S.REVOKING, _E.ROUTER_LOST): _S.REVOKING,
    (_S.REVOKING, _E.WRITER_LOST): _S.CLOSED,
    (_S.REVOKING, _E.DRAIN): _S.REVOKING,
    (_S.ABORTING, _E.CANCEL): _S.ABORTING,
    (_S.ABORTING, _E.TIMEOUT): _S.ABORTING,
    (_S.ABORTING, _E.ROUTER_LOST): _S.ABORTING,
    (_S.ABORTING, _E.WRITER_LOST): _S.ABORTING,
    (_S.ABORTING, _E.FAIL): _S.ABORTING,
    (_S.ABORTING, _E.ENGINE_IDLE): _S.CLOSED,
    (_S.ABORTING, _E.DRAIN): _S.ABORTING,
}

# Why a reservation is let go of before its answer is complete; HandOff.abort takes these.
CAUSES = frozenset({_E.CANCEL, _E.TIMEOUT, _E.ROUTER_LOST, _E.FAIL})


class InvalidReservationError(Exception):
    """Can never be served by this worker; the message says why."""


Key = tuple[object, int]  # the router's session, its key for the request attempt


@dataclass(eq=False)
class Reservation:
    """One request attempt on this worker."""

    key: Key
    transfer_id: int
    prompt_tokens: int
    sampling: SamplingParams
    blocks: list[int]  # of prompt and answer; whoever reads them later has this very list
    first_block: int  # before it, blocks of the prompt that were cached when it was made
    prompt_end: int  # from here on, blocks for the KV of the answer
    lease_end_ms: float
    state: ReservationState = ReservationState.RESERVED
    blocks_received: int = 0
    bad_blocks: set[int] = field(default_factory=set)  # indexes that must come again
    resends: Counter[int] = field(default_factory=Counter)  # asked for, by index
    shared_blocks: int = 0  # others may read so many from the first on
    chain: PrefixChain | None = None  # over the prompt; None: nothing of it is cached
    signature: bytes = b""  # of its ticket
    history: TokenHistory | None = None  # what sampling has to know of the prompt

    @property
    def cached_blocks(self) -> list[int]:
        return self.blocks[: self.first_block]

    @property
    def prompt_blocks(self) -> list[int]:
        """To be written: by the prefill worker, whose ticket has them, or here."""
        return self.blocks[self.first_block : self.prompt_end]

    @property
    def growth_blocks(self) -> list[int]:
        return self.blocks[self.prompt_end :]

    @property
    def ticket_blocks(self) -> int:
        """How many prompt_blocks are."""
        return self.prompt_end - self.first_block

    @property
    def missing_blocks(self) -> int:
        """Of those, the ones that have not come, or must come again."""
        return self.ticket_blocks - self.blocks_received + len(self.bad_blocks)

    @property
    def hashes(self) -> list[bytes]:
        return [] if self.chain is None else self.chain.hashes

    def on(self, event: ReservationEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)

    def expect(self, first_index: int, count: int, *, again: bool = False) -> Sequence[int]:
        """HandOff.expect."""
        end = first_index + count
        if end > self.ticket_blocks:
            text = f"blocks to {end} sent, the ticket ends at {self.ticket_blocks}"
            raise RefusedError(Rejection.OVERSIZED, text)
        if again:
            unasked = set(range(first_index, end)) - self.bad_blocks
            if unasked:
                text = f"blocks {sorted(unasked)} sent again, which nobody asked for"
                raise RefusedError(Rejection.DUPLICATE, text)
        elif first_index != self.blocks_received:
            text = f"blocks from {first_index} sent, expected from {self.blocks_received}"
            early = first_index > self.blocks_received
            raise RefusedError(Rejection.REORDERED if early else Rejection.DUPLICATE, text)
        return self.blocks[self.first_block + first_index : self.first_block + end]

    def received(self, first_index: int, count: int, bad: Sequence[int], resends_max: int) -> None:
        """HandOff.received."""
        self.blocks_received = max(self.blocks_received, first_index + count)
        for index in range(first_index, first_index + count):
            if index not in bad:
                self.bad_blocks.discard(index)
        for index in bad:
            self.bad_blocks.add(index)
            self.resends[index] += 1
            if self.resends[index] > resends_max:
                text = f"block {index} has a wrong checksum for the {self.resends[index]}. time"
                raise RefusedError(Rejection.CHECKSUM, text)
