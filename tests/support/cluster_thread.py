"""A local cluster on an event loop of its own, for tests whose client blocks."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from local_cluster import LocalCluster, local_cluster

T = TypeVar("T")


class ClusterThread:
    def __init__(self, loop: asyncio.AbstractEventLoop, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._loop = loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, done where the cluster is."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextlib.contextmanager
def cluster_thread(model: Path, **options: Any) -> Iterator[ClusterThread]:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        made = local_cluster(model, **options)
        cluster = loop.run_until_complete(made.__aenter__())
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield ClusterThread(loop, cluster)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(made.__aexit__(None, None, None))
