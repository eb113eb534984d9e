"""What a client does when its server is lost in the middle of an answer: owns whom it asks next.

Pure: kvrelay/streams.py tells it what has come and what has failed, and carries out what it says.
Another router goes on with the answer (Resume) where the workers have it still; else the same
request with the same seed gives the same tokens, and those that came before are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay.peer import KvrelayError
from kvrelay.wire import inference_pb2 as pb

_BACKOFF_S = (0.1, 0.2, 0.4, 0.8)  # once every server has been asked in vain; the last stays
_NOT_KEPT = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True)
class Ask:
    """A call to be made: `method` of the Inference service at one of the servers."""

    method: str
    request: Any
    server: int
    wait_s: float = 0.0  # before it
    anew: bool = True  # its answer begins with the first token


class Resuming:
    """One request from its first call to the end of its answer.

    servers: how many there are; first: the one to be asked first. resume_for_s: so long after its
    server was lost an answer may take to go on; 0: it ends with its server. Times are in s of any
    one monotonic clock.
    """

    def __init__(
        self, method: str, request: Any, *, servers: int, first: int, resume_for_s: float
    ) -> None:
        self.resumed = 0  # times that the answer went on after a loss
        self._again = Ask(method, request, first)
        self._now = self._again  # the newest
        self._servers = servers
        self._resume_for_s = resume_for_s
        self._accepted = False  # once, by whatever server
        self._answering = False  # accepted in the newest call
        self._kept_at = ""
        self._nonce = 0  # that it was accepted with
        self._lost_at_s: float | None = None  # since then nothing new has come
        self._tries = 0  # at other servers since then, or before it was accepted
        self._not_before_s: dict[int, float] = {}  # when servers said to ask them again

    @property
    def now(self) -> Ask:
        """The call to be made first; later the newest."""
        return self._now

    def heard(self, event: pb.GenerateResponse, *, new: bool) -> None:
        """new: there was something of the answer that had not come before."""
        if event.HasField("accepted"):
            self._note(event.accepted)
        elif event.HasField("delta") and event.delta.kept_at:
            self._kept_at = event.delta.kept_at
        if new and self._lost_at_s is not None:
            self._lost_at_s, self._tries = None, 0
            self.resumed += 1

    def failed(self, error: KvrelayError, next_offset: int, now_s: float) -> Ask | None:
        """What to do about a call that has failed; None: nothing, it is the end of the request.

        next_offset: so many tokens have come in the newest call, or before where that went on.
        """
        if self._lost_at_s is None:
            if not self._is_loss(error):
                return self._go_elsewhere(error)
            self._lost_at_s = now_s
        elif self._answering and not self._is_loss(error):
            return None
        if now_s - self._lost_at_s >= self._resume_for_s:
            return None
        return self._say(self._next(error, next_offset, now_s))

    def _is_loss(self, error: KvrelayError) -> bool:
        """Of a server that has accepted, this code is said by others, unless it says when to try
        again: then it gives up in order."""
        unsaid = error.code is grpc.StatusCode.UNAVAILABLE and error.retry_ms is None
        return error.lost or (self._answering and unsaid)

    def _go_elsewhere(self, error: KvrelayError) -> Ask | None:
        """A server that is not there, or not ready, is passed over, once each."""
        if self._accepted or error.code is not grpc.StatusCode.UNAVAILABLE:
            return None
        self._tries += 1
        if self._tries == self._servers:
            return None
        return self._say(self._ask_again((self._now.server + 1) % self._servers, 0.0))

    def _say(self, ask: Ask | None) -> Ask | None:
        if ask is not None:
            self._now, self._answering = ask, False
        return ask

    def _next(self, error: KvrelayError, next_offset: int, now_s: float) -> Ask | None:
        now = self._now
        if now.method == "Resume" and error.code in _NOT_KEPT:
            return self._ask_again(now.server, 0.0)
        if error.code is grpc.StatusCode.ALREADY_EXISTS and self._accepted:
            self._rename()
            return self._ask_again(now.server, 0.0)
        full = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_ms is not None
        if not (full or error.lost or error.code is grpc.StatusCode.UNAVAILABLE):
            return None
        self._tries += 1
        if error.retry_ms is not None:
            self._not_before_s[now.server] = now_s + error.retry_ms / 1000
        server, wait_s = self._whom(now_s)
        if full:
            return Ask(now.method, now.request, server, wait_s, now.anew)
        if not self._accepted:
            return self._ask_again(server, wait_s)
        request = pb.ResumeRequest(
            request_id=self._again.request.request_id,
            next_offset=next_offset,
            kept_at=self._kept_at,
            nonce=self._nonce,
        )
        return Ask("Resume", request, server, wait_s, anew=False)

    def _whom(self, now_s: float) -> tuple[int, float]:
        """The next server that may be asked now, or else the first that may; and the wait before
        it, at most what is left of resume_for_s."""
        assert self._lost_at_s is not None, "nothing is lost"
        turns = [(self._now.server + n) % self._servers for n in range(1, self._servers + 1)]
        wait_s = {turn: max(0.0, self._not_before_s.get(turn, now_s) - now_s) for turn in turns}
        server = min(turns, key=wait_s.__getitem__)  # of several the one whose turn is next
        rounds = self._tries // self._servers
        backoff_s = _BACKOFF_S[min(rounds, len(_BACKOFF_S)) - 1] if rounds else 0.0
        left_s = self._lost_at_s + self._resume_for_s - now_s
        return server, min(max(backoff_s, wait_s[server]), left_s)

    def _ask_again(self, server: int, wait_s: float) -> Ask:
        return Ask(self._again.method, self._again.request, server, wait_s)

    def _note(self, accepted: pb.Accepted) -> None:
        """What makes the same request give the same tokens, and be found."""
        self._accepted = self._answering = True
        self._nonce = accepted.nonce
        request = type(self._again.request)()
        request.CopyFrom(self._again.request)
        request.request_id = accepted.request_id
        request.sampling.seed = accepted.seed
        request.ttft_deadline_ms = 0  # its first token may have come in time
        self._again = Ask(self._again.method, request, self._again.server)

    def _rename(self) -> None:
        """Our own request still runs where we ask, or another of its name: let the server choose
        one. Another seed it would not have chosen."""
        self._again.request.request_id = ""
