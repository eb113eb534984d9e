"""Where a request may go: the few workers worth a look, and the best of them.

Pure; kept by router/workers.py, which keeps what this looks at. What is best is router/policy.py's.
"""

from collections.abc import Collection, Mapping
from math import inf

from kvrelay.config import RouterConfig
from kvrelay.kv.layout import reserved_blocks
from router.policy import Aim, Choice, Wish, place
from router.prediction import DecodeView
from router.request import Request
from router.shortlist import Shortlist
from router.shunned import Shunned
from router.worker import DecodeWorker, PrefillWorker

_DISTRUSTED_MAX = 8  # workers that failed, and in whose place others are looked at


class Choosing:
    """prefill, decode: those that are here, by name."""

    def __init__(
        self,
        config: RouterConfig,
        prefill: Mapping[str, PrefillWorker],
        decode: Mapping[str, DecodeWorker],
        prefill_list: Shortlist[PrefillWorker],
        decode_list: Shortlist[DecodeWorker],
        shunned: Shunned,
    ) -> None:
        self._config = config
        self._prefill = prefill
        self._decode = decode
        self._prefill_list = prefill_list
        self._decode_list = decode_list
        self._shunned = shunned

    def have_room(self, request: Request, without: Collection[str] = ()) -> bool:
        """False when surely no decode worker but some has room for it. Cheap."""
        d = self._decode_list.roomiest(without)
        if d is None or d.full:
            return False
        prompt, answer = request.prompt_tokens_now, request.max_tokens_now
        return reserved_blocks(prompt, answer, d.block_size) <= d.room_blocks

    def choose(
        self, request: Request, without: Collection[str] = (), aim: Aim | None = None
    ) -> Choice | None:
        """The best placement of a request now; None when no decode worker has room for it.

        Its cost does not grow with the number of workers, or as its logarithm.

        without: workers that it may not go to. aim: as in Wish.
        """
        if not self.have_room(request, without):
            return None
        failures_max = self._failures_max(request)
        looks = self._distrusted(request) + len(without)
        decode = [
            d.view(blocks)
            for d, blocks in self._decode_list.pick(self._hashes(request), looks)
            if d.worker_id not in without and request.failures[d.worker_id] <= failures_max
        ]
        return self._place(request, decode, without, aim)

    def choose_at(
        self, worker_id: str, request: Request, without: Collection[str] = ()
    ) -> Choice | None:
        """The best placement at one decode worker, as if it were empty."""
        d = self._decode[worker_id]
        view = d.view(0)._replace(blocks_free=d.blocks_total, full=False)
        return self._place(request, [view], without)

    def _place(
        self,
        request: Request,
        decode: list[DecodeView],
        without: Collection[str],
        aim: Aim | None = None,
    ) -> Choice | None:
        wish = Wish(
            request.prompt_tokens_now,
            request.max_tokens_now,
            self._config.prefill_backlog_tokens,
            request.failures,
            self._config.local_prefill == "auto",
            aim,
        )
        looks = self._distrusted(request) + len(without)
        prefill = [
            p.view(blocks)
            for p, blocks in self._prefill_list.pick(self._hashes(request), looks)
            if p.worker_id not in without
        ]
        if self._prefill and not prefill and not wish.local:
            return None
        return place(prefill, decode, wish)

    def _hashes(self, request: Request) -> list[bytes]:
        d = next(iter(self._decode.values()))  # they all name blocks alike
        return request.name_blocks(d.model_fingerprint, d.block_size).hashes

    def _distrusted(self, request: Request) -> int:
        return min(len(request.failures) + len(self._shunned), _DISTRUSTED_MAX)

    def worth_keeping(
        self, request: Request, choice: Choice | None, without: Collection[str] = ()
    ) -> str:
        """The worker that others should leave alone for a while, so that this request finds room.

        Where it would go but for a backlog; else the decode worker with the most room of those that
        could ever hold it. "" when nobody could.
        """
        if choice is not None:
            return choice.placement.prefill or choice.placement.decode
        best = max(
            (d for d in self._able(request) if d.worker_id not in without),
            key=lambda d: (-request.failures[d.worker_id], d.room_blocks),
            default=None,
        )
        return best.worker_id if best else ""

    def _failures_max(self, request: Request) -> float:
        """Of a decode worker that may have the request: its last attempt is not spent on one that
        has failed it while there is a better one, though that may have no room now."""
        if not request.failures or request.attempts_failed + 1 < self._config.attempts_max:
            return inf
        return min((request.failures[d.worker_id] for d in self._able(request)), default=inf)

    def _able(self, request: Request) -> list[DecodeWorker]:
        """Those that could ever hold it."""
        tokens = request.tokens_max
        return [d for d in self._decode.values() if tokens <= d.max_model_tokens and not d.draining]
