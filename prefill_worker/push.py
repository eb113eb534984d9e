"""One job's way to its decode worker: blocks leave as chunks are computed, the last with a commit.

Made by prefill_worker/service.py, one for each job, which tells it how its computation goes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from kvrelay.sessions import Sessions
from kvrelay.transport.channel import to_end
from kvrelay.transport.errors import LinkError, LinkTimeoutError
from kvrelay.transport.writer import Transfer
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode, PrefillEvent
from prefill_worker.schedule import Job, JobEvent, JobState, Schedule

log = logging.getLogger(__name__)


class Push:
    """Has a task from the start, which lives as long as the job.

    steps: how many the engine has made so far; ended: called when the job is closed.
    """

    def __init__(
        self,
        job: Job,
        schedule: Schedule,
        writers: WriterPool,
        sessions: Sessions[PrefillEvent],
        *,
        block_size: int,
        reply_s: float,
        steps: Callable[[], int],
        ended: Callable[[Job], None],
    ) -> None:
        self._job = job
        self._schedule = schedule
        self._writers = writers
        self._sessions = sessions
        self._block_size = block_size
        self._reply_s = reply_s
        self._steps = steps
        self._ended = ended
        self._advanced = asyncio.Event()  # a chunk is done
        self._engine_idle = asyncio.Event()  # no step with this job is running
        self._engine_idle.set()
        self._idle_s = 0.0  # waited for an engine that made no step
        self.started_s = 0.0
        self.computed_s = 0.0
        self.task = asyncio.create_task(self._run())

    def step_begins(self) -> None:
        self._engine_idle.clear()
        self._advanced.set()  # what others have computed can travel during this step

    def step_ended(self) -> None:
        self._engine_idle.set()
        self._advanced.set()

    async def _run(self) -> None:
        """However it ends, the blocks come back."""
        job = self._job
        transfer: Transfer | None = None
        why = JobEvent.CANCEL
        try:
            transfer = await self._writers.begin(job.ticket)
            await self._push(transfer)
            assert job.first_token is not None
            await transfer.commit(job.first_token, self._reply_s)
            self._acknowledged(transfer)
        except LinkError as error:
            late = isinstance(error, LinkTimeoutError)
            why = JobEvent.TIMEOUT if late else JobEvent.DECODER_LOST
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_PEER_LOST, str(error))
        except asyncio.CancelledError:
            log.debug("%s, attempt %d: cancelled", job.ticket.request_id, job.ticket.attempt)
        except Exception as error:
            why = JobEvent.FAIL
            log.exception("handing off %s failed", job.ticket.request_id)
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_INTERNAL, f"hand-off: {error}")
        finally:
            await to_end(self._let_go(transfer, why))  # a cancel must not cut it short

    async def _push(self, transfer: Transfer) -> None:
        """Sends every block that the ticket asks for as soon as it is filled; returns when the
        prompt is computed, too."""
        job = self._job
        while True:
            done = job.first_token is not None
            filled = len(job.blocks) if done else job.computed // self._block_size
            first = job.ticket.first_block + transfer.blocks_sent
            blocks = job.blocks[first:filled]
            if blocks:
                await transfer.push(blocks)
            elif done:
                return
            else:
                await self._wait_for_chunk(transfer)

    async def _wait_for_chunk(self, transfer: Transfer) -> None:
        self._advanced.clear()
        steps, wait_s = self._steps(), transfer.ticket.lease_ms / 3000
        try:
            async with asyncio.timeout(wait_s):
                await self._advanced.wait()
            self._idle_s = 0.0
        except TimeoutError:
            if self._steps() > steps:  # waiting its turn at an engine that moves
                await transfer.push([])  # renews the lease
                self._idle_s = 0.0
                return
            self._idle_s += wait_s
            if self._idle_s >= 3 * wait_s:  # the lease on this side
                text = "the engine made no step within the ticket's lease"
                raise LinkTimeoutError(text) from None

    def _acknowledged(self, transfer: Transfer) -> None:
        if self._job.state is not JobState.HANDING_OFF:
            return  # cancelled in the same moment
        self._schedule.acknowledged(self._job)
        event = worker_pb2.HandedOff(
            key=self._job.key[1],
            kv_bytes=transfer.bytes_sent,
            kv_transfer_ms=transfer.busy_s * 1000,
            kv_exposed_ms=(time.perf_counter() - self.computed_s) * 1000,
            transport=transfer.transport,
        )
        self._sessions.send(self._job.key[0], PrefillEvent(handed_off=event))

    async def _let_go(self, transfer: Transfer | None, why: JobEvent) -> None:
        self._schedule.abort(self._job.key, why)  # first: no cancel comes after it
        if transfer is not None:
            if not transfer.committed:
                with contextlib.suppress(LinkError):
                    await transfer.abort("the prefill worker gave the request up")
            transfer.close()
        await self._engine_idle.wait()
        if self._job.state is JobState.ABORTING:
            self._schedule.quiet(self._job)
        self._ended(self._job)
