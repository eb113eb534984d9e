"""One request on its way through the router: its lifecycle, its token log and its times.

A pure object, owned by the Dispatcher. The token log is the truth about an answer: prompt plus
log can be placed again on any workers, and what a client has seen never changes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from kvrelay.kv.prefix import PrefixChain, chain_root
from kvrelay.lifecycle import advance
from kvrelay.wire import worker_pb2
from router.admission import Sampling
from router.policy import Placement


class RequestState(Enum):
    QUEUED = "queued"
    RESERVING = "reserving"  # a decode worker was asked for blocks
    PREFILLING = "prefilling"  # a prefill worker has the prompt and the ticket, or D the prompt
    DECODING = "decoding"  # the decode worker has the KV
    ENDED = "ended"


class RequestEvent(Enum):
    PLACE = "place"
    RESERVED = "reserved"
    ACCEPTED = "accepted"  # the decode worker sent a token
    ADOPTED = "adopted"  # it was another router's; a decode worker is answering it
    FINISH = "finish"  # the answer is whole
    REFUSED = "refused"  # a worker had no room: nothing has failed
    FAILED = "failed"  # a worker failed it
    TIMEOUT = "timeout"  # its wait, its Reserve or a worker's lease is over
    PEER_LOST = "peer_lost"  # a worker that it is at, or the link between its two
    DRAIN = "drain"  # a worker takes nothing new: what is there goes on, who waits goes elsewhere
    CANCEL = "cancel"  # its client lets go of it
    GIVE_UP = "give_up"  # it can not be served, or not any more


_S, _E = RequestState, RequestEvent

TRANSITIONS: dict[tuple[RequestState, RequestEvent], RequestState] = {
    (_S.QUEUED, _E.PLACE): _S.RESERVING,
    (_S.QUEUED, _E.ADOPTED): _S.DECODING,
    (_S.QUEUED, _E.TIMEOUT): _S.ENDED,
    (_S.QUEUED, _E.PEER_LOST): _S.QUEUED,  # where it was: its peer knew before us
    (_S.QUEUED, _E.DRAIN): _S.QUEUED,
    (_S.QUEUED, _E.CANCEL): _S.ENDED,
    (_S.QUEUED, _E.GIVE_UP): _S.ENDED,
    (_S.RESERVING, _E.RESERVED): _S.PREFILLING,
    (_S.RESERVING, _E.REFUSED): _S.QUEUED,
    (_S.RESERVING, _E.FAILED): _S.QUEUED,
    (_S.RESERVING, _E.TIMEOUT): _S.QUEUED,
    (_S.RESERVING, _E.PEER_LOST): _S.QUEUED,
    (_S.RESERVING, _E.DRAIN): _S.RESERVING,
    (_S.RESERVING, _E.CANCEL): _S.ENDED,
    (_S.RESERVING, _E.GIVE_UP): _S.ENDED,
    (_S.PREFILLING, _E.ACCEPTED): _S.DECODING,
    (_S.PREFILLING, _E.FINISH): _S.ENDED,  # its first token was all, and the rest is lost
    (_S.PREFILLING, _E.REFUSED): _S.QUEUED,
    (_S.PREFILLING, _E.FAILED): _S.QUEUED,
    (_S.PREFILLING, _E.TIMEOUT): _S.QUEUED,
    (_S.PREFILLING, _E.PEER_LOST): _S.QUEUED,
    (_S.PREFILLING, _E.DRAIN): _S.PREFILLING,
    (_S.PREFILLING, _E.CANCEL): _S.ENDED,
    (_S.PREFILLING, _E.GIVE_UP): _S.ENDED,
    (_S.DECODING, _E.FINISH): _S.ENDED,
    (_S.DECODING, _E.FAILED): _S.QUEUED,
    (_S.DECODING, _E.TIMEOUT): _S.QUEUED,
    (_S.DECODING, _E.PEER_LOST): _S.QUEUED,
    (_S.DECODING, _E.DRAIN): _S.DECODING,
    (_S.DECODING, _E.CANCEL): _S.ENDED,
    (_S.DECODING, _E.GIVE_UP): _S.ENDED,
}


LOCAL = "local"  # the transport of KV that is computed where it is needed


class TokenMismatchError(Exception):
    """A worker sent a token that contradicts the log, or left a gap."""


class Ending(Enum):
    EOS = 1
    LENGTH = 2
    STOP_STRING = 3


ENDINGS = {worker_pb2.ENDING_EOS: Ending.EOS, worker_pb2.ENDING_LENGTH: Ending.LENGTH}


@dataclass
class Times:
    """Milliseconds; *_at_ms on the router's monotonic clock, the others as workers measured."""

    arrived_at_ms: float
    prefill_began_at_ms: float | None = None
    first_token_at_ms: float | None = None
    last_token_at_ms: float | None = None
    prefill_ms: float = 0.0
    kv_bytes: int = 0
    kv_transfer_ms: float = 0.0
    kv_exposed_ms: float = 0.0
    transport: str = ""
    cached_tokens: int = 0  # of the prompt, that no attempt has computed
    _cached_before: int | None = None  # the same of earlier attempts; None: there were none

    def note_start(self, started: worker_pb2.PrefillStarted, now_ms: float) -> None:
        if self.prefill_began_at_ms is None:
            self.prefill_began_at_ms = now_ms
        else:
            self._cached_before = self.cached_tokens
        self._note_cached(started.cached_tokens)

    def note_computed(self, first_token: worker_pb2.FirstToken) -> None:
        """Others may have computed more of the prompt since it was started."""
        self.prefill_ms += first_token.prefill_ms
        self._note_cached(max(self.cached_tokens, first_token.cached_tokens))

    def note_hand_off(self, handed_off: worker_pb2.HandedOff) -> None:
        self.kv_bytes += handed_off.kv_bytes
        self.kv_transfer_ms += handed_off.kv_transfer_ms
        self.kv_exposed_ms += handed_off.kv_exposed_ms
        self.transport = handed_off.transport

    def note_computed_here(self, first_token: worker_pb2.FirstToken) -> None:
        """The decode worker has computed the prompt itself; no KV has moved."""
        self.note_computed(first_token)
        self.transport = LOCAL

    def _note_cached(self, tokens: int) -> None:
        before = self._cached_before
        self.cached_tokens = tokens if before is None else min(before, tokens)


@dataclass(eq=False)
class Request:
    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    times: Times
    state: RequestState = RequestState.QUEUED
    answer: list[int] = field(default_factory=list)  # the token log
    ending: Ending | None = None  # the decode worker's word, before all is wound up
    tenant: str = ""  # the salt of who was authenticated: its prefixes are its own
    chain: PrefixChain | None = None  # over the prompt of the newest attempt
    priority: int = 0  # lower goes first
    ttft_deadline_ms: int = 0  # after arrival; 0: none
    nonce: int = 0  # tells it from another router's of the same name

    number: int = 0  # in the order of arrival
    uncached_tokens: int = 0  # of its prompt, when it was first looked at; 0: it was not
    compute_ms: float = 0.0  # of its prompt, at least, as predicted at arrival; 0: nobody knows

    # What earlier attempts have taught
    failures: Counter[str] = field(default_factory=Counter)  # of attempts, by worker
    suspect_id: str = ""  # a worker that is gone, by word of its peer
    suspected_at_ms: float = 0.0
    strikes: dict[str, float] = field(default_factory=dict)  # by worker that died under it

    # The present attempt
    attempt: int = 0
    spared: int = 0  # of the attempts: a worker was lost, which is no failure of the request
    placement: Placement | None = None
    key: int = 0
    base: int = 0  # length of the log when the attempt began
    prefill_id: str | None = None  # None: the decode worker computes the prompt itself
    decode_id: str = ""
    queued_at_ms: float = 0.0
    placed_at_ms: float = 0.0
    prefill_settled: bool = False  # P has no more to say of it, or there is none
    _wire: worker_pb2.Prefill = field(default_factory=worker_pb2.Prefill)  # has prompt_on_wire
    _named: tuple[str, int, int] | None = None  # what `chain` is over

    @property
    def name(self) -> tuple[str, str]:
        """By tenant: whether another's id is running is nobody's business."""
        return self.tenant, self.request_id

    @property
    def prefill_here(self) -> bool:
        """Whether the decode worker of the present attempt computes the prompt."""
        return self.prefill_id is None

    def on(self, event: RequestEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)

    @property
    def attempts_failed(self) -> int:
        """Of those that have ended, where one has."""
        return self.attempt - self.spared

    @property
    def begun(self) -> bool:
        """Whether the present attempt has brought a token."""
        return len(self.answer) > self.base

    @property
    def deadline_at_ms(self) -> float:
        """When its first token is due; inf when it has no deadline, or has its first token."""
        if not self.ttft_deadline_ms or self.times.first_token_at_ms is not None:
            return inf
        return self.times.arrived_at_ms + self.ttft_deadline_ms

    @property
    def tokens_max(self) -> int:
        """Of prompt and answer together."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def prompt_now(self) -> list[int]:
        """What a new attempt must prefill: the prompt and the answer so far."""
        return [*self.prompt, *self.answer]

    @property
    def prompt_on_wire(self) -> Sequence[int]:
        """prompt_now as messages take it in microseconds; each token is turned into it once."""
        tokens = self._wire.prompt_token_ids
        if len(tokens) < self.prompt_tokens_now:
            tokens.extend(self.prompt_now[len(tokens) :])
        return tokens

    @property
    def prompt_tokens_now(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def max_tokens_now(self) -> int:
        return self.sampling.max_tokens - len(self.answer)

    @property
    def min_tokens_now(self) -> int:
        return max(0, self.sampling.min_tokens - len(self.answer))

    def name_blocks(self, model_fingerprint: str, block_size: int) -> PrefixChain:
        """Brings `chain` up to date with prompt_now; each token is hashed once."""
        named = (model_fingerprint, block_size, self.prompt_tokens_now)
        if self.chain is not None and self._named == named:
            return self.chain
        self._named = named
        root = chain_root(model_fingerprint, block_size, salt=self.tenant)
        if self.chain is None or self.chain.root != root:
            self.chain = PrefixChain(root, block_size)
        self.chain.extend(self.prompt_now[len(self.chain) :])
        return self.chain

    def complete(self) -> Ending | None:
        """How the answer ended, if its log is a whole answer."""
        if self.answer and self.answer[-1] in self.sampling.eos_token_ids:
            return Ending.EOS
        return Ending.LENGTH if self.max_tokens_now <= 0 else None

    def log(self, offset: int, tokens: Sequence[int], now_ms: float) -> list[int]:
        """Adds tokens of the present attempt; offset counts from its start.

        Both workers name the attempt's first token, so a repeat is normal and changes nothing.

        Returns the tokens that are new.
        """
        start = self.base + offset
        known = self.answer[start : start + len(tokens)]
        if start > len(self.answer) or known != list(tokens[: len(known)]):
            raise TokenMismatchError(f"tokens {list(tokens)} at {start} after {len(self.answer)}")
        new = list(tokens[len(known) :])
        if new:
            self.answer.extend(new)
            if self.times.first_token_at_ms is None:
                self.times.first_token_at_ms = now_ms
            self.times.last_token_at_ms = now_ms
        return new
