"""Owns the thread that replaces workers and routers meanwhile, as `kvrelay serve` does.

Made by run.py, which asks again and again whether it still does.
"""

import contextlib
import threading
from collections.abc import Iterator

from cluster.serving import Serving


class Supervisor:
    """What `kvrelay serve` does meanwhile: replaces who dies."""

    def __init__(self, serving: Serving) -> None:
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(serving,), daemon=True)
        self._failure: Exception | None = None

    def check(self) -> None:
        """Raises what has ended it: ServeError when it has given up."""
        if self._failure is not None:
            raise self._failure

    def _watch(self, serving: Serving) -> None:
        try:
            serving.watch(self.stopping)
        except Exception as error:  # whatever it is, nobody is replaced any more
            self._failure = error


@contextlib.contextmanager
def supervised(serving: Serving) -> Iterator[Supervisor]:
    supervisor = Supervisor(serving)
    supervisor.thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stopping.set()
        supervisor.thread.join()
