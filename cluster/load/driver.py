"""The process that asks, so that its pauses are not those of who started it.

Started by run.py as `python -m cluster.load.driver`. Each line of stdin is a command, a JSON
object, which is answered with one:

  {"do": "open", ...}      the arguments are those of Plan; asks the server once, makes the prompts
  {"do": "begin"}          the workload begins
  {"do": "progress"}       how far it is
  {"do": "finish"}         sends no more, gives up what runs; what was seen of the run as a whole
  {"do": "outcomes", "first": A, "count": N}   so many of them
"""

import asyncio
import gc
import resource
import signal
from dataclasses import asdict
from typing import Any

from cluster.bench.answering import answer_lines
from cluster.load.grpc_target import GrpcTarget
from cluster.load.http_target import HttpTarget
from cluster.load.pacing import Pacing
from cluster.load.plan import LoadError, Plan
from cluster.load.result import LoopLateness, outcome_fields
from cluster.load.targets import Opened
from cluster.workload.figures import quantiles

_OPEN_S = 90.0  # for the server's answer before the load
_FILES_SPARE = 64  # open files that are no connections


class Driver:
    async def open(self, **plan: Any) -> dict[str, Any]:
        asked = Plan.model_validate(plan)
        _allow_files(asked.connections_max + _FILES_SPARE)
        kind = HttpTarget if asked.target.is_http else GrpcTarget
        workload = asked.workload
        try:
            async with asyncio.timeout(_OPEN_S):
                self._opened: Opened = await kind.open(
                    asked.target, asked.prompts_seed, workload.block_tokens
                )
        except TimeoutError:
            raise LoadError(
                f"{asked.target.url}: one short request had no answer within {_OPEN_S:g} s"
            ) from None
        self._pacing = Pacing(self._opened, workload, asked.connections_max, asked.target.timeout_s)
        self._pacing.prepare()
        # What there is now stays: the collector, whose pauses would be in all figures, need not
        # look at it.
        gc.collect()
        gc.freeze()
        return asdict(self._opened.server)

    async def begin(self) -> dict[str, Any]:
        self._pacing.begin()
        return {}

    async def progress(self) -> dict[str, Any]:
        pacing = self._pacing
        pacing.check()
        return {
            "sent": pacing.sent,
            "running": pacing.running,
            "ended": len(pacing.outcomes),
            "tokens": pacing.tokens,
            "at_s": pacing.clock(),
            "done": pacing.is_done,
        }

    async def finish(self) -> dict[str, Any]:
        pacing = self._pacing
        unfinished = pacing.running
        await pacing.stop()
        await self._opened.close()
        late = quantiles(pacing.loop_late_ms)
        return {
            "outcomes": len(pacing.outcomes),
            "unfinished": unfinished,
            "held": pacing.held,
            "told": pacing.told,
            "loop": asdict(LoopLateness(late.p50, late.p99, late.most) if late else LoopLateness()),
        }

    async def outcomes(self, first: int, count: int) -> dict[str, Any]:
        some = self._pacing.outcomes[first : first + count]
        return {"outcomes": [outcome_fields(outcome) for outcome in some]}


def _allow_files(count: int) -> None:
    """Each connection is an open file; most systems allow few unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who started it says when to end
    asyncio.run(answer_lines(Driver, (LoadError, OSError)))
