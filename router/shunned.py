"""The workers that attempts have failed at: they come last for a while.

Pure, used by router/workers.py alone. One that fails at once is always the least busy, and would
get every request.
"""

from kvrelay.config import RouterConfig
from router.worker import Worker


class Shunned:
    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._until: dict[str, tuple[Worker, float]] = {}  # by name

    def __len__(self) -> int:
        return len(self._until)

    def shun(self, worker: Worker, now_ms: float) -> bool:
        """For longer each time, up to a limit; False when it is shunned already.

        What else fails there meanwhile had begun before, and makes it no longer.
        """
        if worker.shunned:
            return False
        limits = self._config
        worker.shun_ms = min(2 * worker.shun_ms or limits.shun_ms, limits.shun_max_ms)
        worker.shunned = True
        self._until[worker.worker_id] = worker, now_ms + worker.shun_ms
        return True

    def trust(self, worker: Worker) -> bool:
        """Whether that changes anything."""
        if self._until.pop(worker.worker_id, None) is None:
            return False
        worker.shunned = False
        return True

    def over(self, now_ms: float) -> list[Worker]:
        """Those whose time is up."""
        return [worker for worker, until_ms in self._until.values() if until_ms <= now_ms]

    def forget(self, worker_id: str) -> None:
        self._until.pop(worker_id, None)
