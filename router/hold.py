"""The one worker that is kept for a request that has waited for room for too long.

Pure, used by the Dispatcher alone. Without it, room for a large request would always go to small
ones. Others go elsewhere meanwhile; the hold is short, and after it comes a pause, so that they
pass even where there is no other worker.
"""

from kvrelay.config import RouterConfig
from router.request import Request, RequestState

_WAITING = (RequestState.QUEUED, RequestState.RESERVING)


class Hold:
    def __init__(self, config: RouterConfig) -> None:
        self.worker_id = ""  # "": none is kept
        self._config = config
        self._request: Request | None = None
        self._ends_at_ms = 0.0  # of the hold; without one, of the pause

    def begin(self, request: Request, worker_id: str, now_ms: float) -> None:
        assert self.may_begin(now_ms)
        self._request, self.worker_id = request, worker_id
        self._ends_at_ms = now_ms + self._config.queue_hold_ms

    def may_begin(self, now_ms: float) -> bool:
        return self._request is None and now_ms >= self._ends_at_ms

    @property
    def waits_no_more(self) -> bool:
        """Whether the request is elsewhere, so that the hold is over."""
        return self._request is not None and self._request.state not in _WAITING

    def end_if_over(self, now_ms: float) -> bool:
        """Its time is up, or its request waits no more. Whether it has ended."""
        over = self._request is not None and (now_ms >= self._ends_at_ms or self.waits_no_more)
        if over:
            self.end(now_ms)
        return over

    def end(self, now_ms: float) -> None:
        self._request, self.worker_id = None, ""
        self._ends_at_ms = now_ms + self._config.queue_hold_pause_ms

    def kept_from(self, request: Request) -> set[str]:
        """The worker that this request may not go to, if any."""
        return {self.worker_id} if self.worker_id and request is not self._request else set()
