"""One reservation of a decode worker and its lifecycle: every state, event and legal transition.

decode_worker/handoff.py owns all of them and is the only one who changes them.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling import SamplingParams
from kvrelay.kv.prefix import PrefixChain
from kvrelay.lifecycle import advance


class ReservationState(Enum):
    RESERVED = "reserved"  # blocks promised, no writer yet
    RECEIVING = "receiving"  # a writer has leave to write
    PREFILLING = "prefilling"  # the engine here computes the prompt, or will when its turn comes
    DECODING = "decoding"  # the prompt's KV is complete
    ABORTING = "aborting"  # not wanted, but the writer or the engine has not let go
    CLOSED = "closed"


class ReservationEvent(Enum):
    BEGIN = "begin"
    COMMIT = "commit"
    PREFILL = "prefill"  # no writer: the prompt is for the engine here
    COMPUTED = "computed"
    FINISH = "finish"
    ABORT = "abort"  # cancel, timeout, a lost router
    WRITER_LOST = "writer_lost"  # the writer let go, or its link ended
    ENGINE_IDLE = "engine_idle"  # the step that was running has ended


_S, _E = ReservationState, ReservationEvent

TRANSITIONS: dict[tuple[ReservationState, ReservationEvent], ReservationState] = {
    (_S.RESERVED, _E.BEGIN): _S.RECEIVING,
    (_S.RESERVED, _E.ABORT): _S.CLOSED,
    (_S.RECEIVING, _E.COMMIT): _S.DECODING,
    (_S.RECEIVING, _E.ABORT): _S.ABORTING,
    (_S.RECEIVING, _E.WRITER_LOST): _S.CLOSED,
    (_S.RESERVED, _E.PREFILL): _S.PREFILLING,
    (_S.PREFILLING, _E.COMPUTED): _S.DECODING,
    (_S.PREFILLING, _E.ABORT): _S.ABORTING,
    (_S.DECODING, _E.FINISH): _S.CLOSED,
    (_S.DECODING, _E.ABORT): _S.ABORTING,
    (_S.ABORTING, _E.ABORT): _S.ABORTING,
    (_S.ABORTING, _E.WRITER_LOST): _S.CLOSED,
    (_S.ABORTING, _E.ENGINE_IDLE): _S.CLOSED,
}


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
    def hashes(self) -> list[bytes]:
        return [] if self.chain is None else self.chain.hashes

    def on(self, event: ReservationEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)
