"""Requests of another router that clients ask this one to go on with: who has them, and how they
become this router's own.

Pure, used by the Dispatcher alone. Decode workers keep what they answer when a router is lost
(decode_worker/kept.py). Whoever has the request tells it whole, as it was reserved, and its tokens;
from then on it is a request like any other here.
"""

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from router.admission import Sampling
from router.attempts import Attempts
from router.commands import (
    Command,
    NotKept,
    NotKeptTrouble,
    Resumed,
    adopt,
    cancel_adopted,
)
from router.request import ENDINGS, Request, Times
from router.requests import Requests
from router.resumption import Resumption
from router.workers import Workers


class Adoptions:
    def __init__(
        self, config: RouterConfig, requests: Requests, workers: Workers, attempts: Attempts
    ) -> None:
        self._resume_ms = config.resume_ms
        self._requests = requests
        self._workers = workers
        self._attempts = attempts
        self._by_key: dict[int, Resumption] = {}  # by the keys of Adopts not answered yet

    def resume(self, wish: Resumption) -> list[Command]:
        """Asks the workers who may have it, unless it runs here: then its client has lost no more
        than its connection."""
        running = self._requests.get(wish.name)
        if running is not None:
            return [self._found_here(wish, running)]
        asked = [d for d in self._workers.decode if not wish.kept_at or d == wish.kept_at]
        if not asked:
            return [_not_kept(wish)]
        wish.asked = dict(zip(self._attempts.take_keys(len(asked)), asked, strict=True))
        self._by_key |= dict.fromkeys(wish.asked, wish)
        return [adopt(worker_id, key, wish) for key, worker_id in wish.asked.items()]

    def withdraw(self, wish: Resumption) -> None:
        """Nobody waits for it any more: whoever still says that it has it is told to let go."""
        for key in wish.asked:
            del self._by_key[key]
        wish.asked.clear()

    def adopted(self, worker_id: str, adopted: worker_pb2.Adopted, now_ms: float) -> list[Command]:
        """A worker has it. The first that knows what the client has keeps it, all others let go."""
        wish = self._by_key.get(adopted.key)
        if wish is None:
            return [cancel_adopted(worker_id, adopted.key)]
        known = adopted.reserve.answered + len(adopted.token_ids)
        if known < wish.next_offset:  # an old attempt's: a newer one may be elsewhere
            wish.known = max(wish.known or 0, known)
            return [cancel_adopted(worker_id, adopted.key), *self._without(adopted.key)]
        self.withdraw(wish)
        running = self._requests.get(wish.name)
        if running is not None:  # asked for again here, meanwhile
            return [cancel_adopted(worker_id, adopted.key), self._found_here(wish, running)]
        request = _request_of(adopted, now_ms)
        self._requests.add(request)
        self._attempts.adopt(request, adopted, worker_id, now_ms)
        request.ending = ENDINGS.get(adopted.ending)
        return [Resumed(wish, request), *self._requests.finish_if_complete(request)]

    def refused(self, failed: worker_pb2.Failed) -> list[Command]:
        """A worker does not have it. Nothing for a key that is no Adopt's."""
        return self._without(failed.key) if failed.key in self._by_key else []

    def _without(self, key: int) -> list[Command]:
        """Who was asked by this key does not have it; perhaps another does."""
        wish = self._by_key.pop(key)
        del wish.asked[key]
        return [] if wish.asked else [_not_kept(wish)]

    def worker_down(self, worker_id: str) -> list[Command]:
        mine = [key for key, wish in self._by_key.items() if wish.asked[key] == worker_id]
        return [command for key in mine for command in self.refused(worker_pb2.Failed(key=key))]

    def expire(self, now_ms: float) -> list[Command]:
        """Ends the waits for workers that do not answer."""
        over = {
            wish: None
            for wish in self._by_key.values()
            if now_ms - wish.asked_at_ms > self._resume_ms
        }
        for wish in over:
            self.withdraw(wish)
        return [_not_kept(wish) for wish in over]

    def _found_here(self, wish: Resumption, running: Request) -> Resumed | NotKept:
        """running: the one of its name."""
        if running.nonce != wish.nonce:
            return _not_kept(wish, f"another request {wish.request_id!r} runs here")
        if len(running.answer) >= wish.next_offset:
            return Resumed(wish, running)
        wish.known = len(running.answer)
        return _not_kept(wish)

    def check(self) -> None:
        """Asserts that both directions agree. For tests."""
        assert all(key in wish.asked for key, wish in self._by_key.items())


def _not_kept(wish: Resumption, why: str = "") -> NotKept:
    if not why and wish.known is not None:
        why = f"only {wish.known} tokens of request {wish.request_id!r} are known here"
    why = why or f"no worker keeps request {wish.request_id!r}"
    return NotKept(wish, NotKeptTrouble(f"{why}: ask again, with the seed it was accepted with"))


def _request_of(adopted: worker_pb2.Adopted, now_ms: float) -> Request:
    """As it was before D's attempt; `answered` tokens of the attempt's prompt are the answer's."""
    reserve = adopted.reserve
    sampling = reserve.sampling
    tokens = list(reserve.prompt_token_ids)
    split = len(tokens) - reserve.answered
    return Request(
        request_id=reserve.request_id,
        prompt=tokens[:split],
        sampling=Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens + reserve.answered,
            stop=tuple(reserve.stop),
            eos_token_ids=tuple(sampling.eos_token_ids),
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            min_tokens=reserve.min_tokens,
        ),
        times=Times(arrived_at_ms=now_ms),
        answer=tokens[split:],
        tenant=reserve.tenant,
        priority=reserve.priority,
        nonce=reserve.nonce,
    )
