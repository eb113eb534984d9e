"""The attempts under way: which pair of workers has which request, and under which key.

Pure, used by the Dispatcher alone. An attempt begins with a placement and ends when the request
ends or is to be placed again; what comes under its key after that is nobody's.
"""

from kvrelay.wire import worker_pb2
from router.commands import Command, acknowledge, cancel_decode, cancel_prefill, reserve
from router.policy import Placement
from router.request import Request, RequestEvent, RequestState
from router.workers import Workers


class Attempts:
    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._by_key: dict[int, Request] = {}
        self._next_key = 1

    def get(self, key: int) -> Request | None:
        return self._by_key.get(key)

    def all(self) -> list[Request]:
        return list(self._by_key.values())

    def begin(self, request: Request, placement: Placement, now_ms: float) -> Command:
        request.on(RequestEvent.PLACE)
        request.attempt += 1
        [request.key] = self.take_keys(1)
        request.base = len(request.answer)
        request.placement = placement
        request.prefill_id, request.decode_id = placement.pair
        request.placed_at_ms = now_ms
        request.prefill_settled = request.prefill_here
        decode = self._workers.decode[placement.decode]
        request.name_blocks(decode.model_fingerprint, decode.block_size)
        self._by_key[request.key] = request
        self._workers.claim(
            request.key, placement, request.prompt_tokens_now, request.max_tokens_now
        )
        return reserve(request)

    def take_keys(self, count: int) -> range:
        """Keys that no attempt has had or will have."""
        first, self._next_key = self._next_key, self._next_key + count
        return range(first, self._next_key)

    def adopt(
        self, request: Request, adopted: worker_pb2.Adopted, worker_id: str, now_ms: float
    ) -> None:
        """A decode worker has an attempt of another router, with these tokens, for us."""
        request.on(RequestEvent.ADOPTED)
        request.attempt, request.key = 1, adopted.key
        request.base = len(request.answer)
        request.placement = Placement(None, worker_id, 0.0, 0.0, tokens=1)
        request.decode_id = worker_id
        request.placed_at_ms = now_ms
        request.prefill_settled = True
        self._by_key[request.key] = request
        self._workers.claim(
            request.key, request.placement, request.prompt_tokens_now, request.max_tokens_now
        )
        self._workers.claims.reserved(request.key, 0)
        request.log(0, adopted.token_ids, now_ms)
        self._workers.claims.computed(request.key)

    def acknowledge(self, request: Request) -> list[Command]:
        """Its client has the answer, or does not want it: its decode worker need not keep it."""
        if request.ending is None or request.decode_id not in self._workers.decode:
            return []
        request.ending = None  # said once
        return [acknowledge(request)]

    def release(self, request: Request) -> bool:
        """Ends the present attempt here; False when there is none."""
        if self._by_key.pop(request.key, None) is None:
            return False
        self._workers.claims.release(request.key)
        return True

    def withdraw(self, request: Request, refused_by: str = "") -> list[Command]:
        """Ends the present attempt, if any, here and at both workers.

        refused_by: the worker that has not taken it, and need not be told.
        """
        if not self.release(request):
            return []
        commands: list[Command] = []
        if request.decode_id in self._workers.decode and request.decode_id != refused_by:
            commands.append(cancel_decode(request))
        asked_prefill = request.state is not RequestState.RESERVING
        told = request.prefill_id in self._workers.prefill and request.prefill_id != refused_by
        if asked_prefill and told:
            commands.append(cancel_prefill(request))
        return commands

    def check(self) -> None:
        """Asserts that the sums kept for each worker are those of its requests. For tests."""
        assert all(request.key == key for key, request in self._by_key.items())
        self._workers.check(self._by_key.values())
