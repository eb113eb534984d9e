"""The steps of a decode worker: one after another, for whoever is in the batch and for prompts.

Made and run by decode_worker/service.py, which brings it who is to be computed; requests end here,
or leave when they are let go of. What each step computes is decided by Batch and LocalPrompts.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from decode_worker import messages
from decode_worker.batch import Batch, Ending, Output, Running
from decode_worker.handoff import HandOff
from decode_worker.kept import Kept
from decode_worker.prompts import LocalPrompt, LocalPrompts
from decode_worker.reservation import Key, ReservationEvent
from decode_worker.slack import Slack
from decode_worker.step import DecodeStep
from kvrelay.clock import now_ms, now_s
from kvrelay.engine.host import EngineHangsError, EngineHost
from kvrelay.engine.sampling import NOT_A_NUMBER
from kvrelay.engine.step import CancelFlag, StepCancelledError
from kvrelay.engine.turns import Chunk
from kvrelay.failpoints import Failpoints, Point
from kvrelay.sessions import Sessions
from kvrelay.wire.worker_pb2 import DecodeEvent, FailureCode

log = logging.getLogger(__name__)

_PAUSE_MIN_MS = 4.0  # who comes for less is more in the way than of use
_PAUSE_LOOK_MS = 3.0  # until it looks again whether there is still somebody to pause for


class StepLoop:
    """tpot_target_ms: that of answers, 0 for none. freed: called when there may be more blocks than
    before."""

    def __init__(
        self,
        engine: EngineHost,
        handoff: HandOff,
        batch: Batch,
        prompts: LocalPrompts,
        kept: Kept,
        sessions: Sessions[DecodeEvent],
        *,
        tpot_target_ms: float,
        freed: Callable[[], None],
        failpoints: Failpoints,
    ) -> None:
        self.decoding: dict[Key, Running] = {}
        self.cancelled = CancelFlag()  # of the step that runs
        self._engine = engine
        self._handoff = handoff
        self._batch = batch
        self._prompts = prompts
        self._kept = kept
        self._sessions = sessions
        self._slack = Slack(tpot_target_ms)
        self._freed = freed
        self._failpoints = failpoints
        self._in_step: set[Key] = set()
        self._work = asyncio.Event()
        self._step_ended_ms = 0.0
        self._pausing = False

    async def run(self) -> None:
        """Never returns. Raises EngineHangsError: the worker is lost."""
        while True:
            if pause_ms := self._pause_ms():
                self._engine.lend_cores()
                await asyncio.sleep(min(pause_ms, _PAUSE_LOOK_MS) / 1000)
                continue
            step = self._next_step()
            if not step:
                self._engine.lend_cores()
                self._work.clear()
                await self._work.wait()
                continue
            self._begins(step)
            try:
                self._failpoints.hit(Point.DECODE_BEFORE_STEP)
                tokens = await self._engine.step(
                    step.slices(),
                    step.params(),
                    step.positions(),
                    step.histories(),
                    self.cancelled,
                )
                self._failpoints.hit(Point.DECODE_AFTER_STEP)
            except StepCancelledError:
                self._engine_idle(step)
                self._freed()
            except EngineHangsError:
                raise
            except Exception as error:
                log.exception("a decode step failed")
                self._failed(step, error)
            else:
                self._done(step, tokens)

    def _next_step(self) -> DecodeStep:
        running, fit = self._batch.next_step(), self._engine.fit
        if not len(self._prompts):
            return DecodeStep(running)
        room = self._slack.room(running, now_ms(), fit, self._coming)
        return DecodeStep(running, self._prompts.next_chunks(len(running), fit, room))

    def _pause_ms(self) -> float:
        """How long this worker's cores are lent before the next step; 0: not, or no longer."""
        if not len(self._batch) or len(self._prompts) or not self._engine.neighbour_computes:
            self._pausing = False
            return 0.0
        pause_ms = self._slack.pause_ms(
            self._batch.next_step(), now_ms(), self._engine.fit, self._coming, self._step_ended_ms
        )
        # One that has begun goes on to its end.
        least_ms = 0.0 if self._pausing else _PAUSE_MIN_MS
        self._pausing = pause_ms > least_ms
        return pause_ms if self._pausing else 0.0

    @property
    def _coming(self) -> int:
        """Answers whose prompts others compute."""
        return len(self._handoff) - len(self.decoding) - len(self._prompts)

    def add(self, prompt: LocalPrompt) -> None:
        """A prompt to be computed here; raises PromptsFullError."""
        self._prompts.add(prompt)
        self._work.set()

    def join(self, sequence: Running, first_token: int) -> None:
        """A sequence whose prompt has come as a whole."""
        self._slack.received()
        self._publish([self._join(sequence, first_token)])
        self._work.set()

    def let_go(self, key: Key, why: ReservationEvent) -> int | None:
        """Computes no more for this request, and aborts its reservation (HandOff.abort). Returns
        the transfer whose writer must be told, if there is one."""
        self._batch.leave(key)
        self._prompts.leave(key)
        sequence = self.decoding.pop(key, None)
        answer = sequence.answer if sequence else ()
        self._kept.let_go(key)
        transfer_id = self._handoff.abort(key, why, answer, in_step=key in self._in_step)
        if all(map(self._handoff.is_aborting, self._in_step)):
            self.cancelled.set()  # or its blocks would wait for a step nobody wants
        self._freed()
        return transfer_id

    def _begins(self, step: DecodeStep) -> None:
        self._in_step |= set(step.keys)
        self.cancelled = CancelFlag()
        for chunk in step.chunks:
            if chunk.is_first:
                chunk.job.started_s = now_s()
                self._sessions.send(chunk.job.key[0], messages.started(chunk.job))

    def _done(self, step: DecodeStep, tokens: Sequence[int | None]) -> None:
        self._engine_idle(step)
        whole = []
        for sequence, token in zip(step.running, step.tokens_of_running(tokens), strict=True):
            if token is None:
                self._spoilt(sequence.key)
            else:
                whole.append((sequence, token))
        outputs = self._batch.apply([s for s, _ in whole], [token for _, token in whole])
        for chunk, token in zip(step.chunks, step.tokens_of_chunks(tokens), strict=True):
            if self._prompts.computed(chunk):
                outputs += self._chunk_done(chunk, token)
        self._publish(outputs)
        self._freed()

    def _chunk_done(self, chunk: Chunk[LocalPrompt], token: int | None) -> list[Output]:
        prompt = chunk.job
        self._handoff.share_prompt(prompt.key, prompt.computed)
        if not chunk.is_last:
            return []
        if token is None:
            self._spoilt(prompt.key)
            return []
        self._handoff.computed(prompt.key)
        prefill_ms = (now_s() - prompt.started_s) * 1000
        self._sessions.send(prompt.key[0], messages.first_token(prompt, token, prefill_ms))
        sequence = Running(
            key=prompt.key,
            prompt_tokens=len(prompt.prompt),
            sampling=prompt.sampling,
            blocks=prompt.blocks,
            history=prompt.history,
        )
        return [self._join(sequence, token)]

    def _join(self, sequence: Running, first_token: int) -> Output:
        self.decoding[sequence.key] = sequence
        sequence.begun_ms = now_ms()
        self._kept.begun(sequence.key, sequence.answer)
        return self._batch.join(sequence, first_token)

    def _spoilt(self, key: Key) -> None:
        self._handoff.distrust(key)
        self._end(key, NOT_A_NUMBER)

    def _failed(self, step: DecodeStep, error: Exception) -> None:
        self._engine_idle(step)
        for key in step.keys:
            self._end(key, f"decode step: {error}")

    def _end(self, key: Key, why: str) -> None:
        holder = self._kept.holder(key)
        self.let_go(key, ReservationEvent.FAIL)
        if holder is not None:
            self._sessions.fail(holder, FailureCode.FAILURE_CODE_INTERNAL, why)

    def _engine_idle(self, step: DecodeStep) -> None:
        """Frees what was aborted while the step ran."""
        self._step_ended_ms = now_ms()
        self._handoff.engine_moved(self._step_ended_ms)
        for key in step.keys:
            self._in_step.discard(key)
            if self._handoff.is_aborting(key):
                self._handoff.engine_idle(key)

    def _publish(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.ending is not Ending.NONE:
                self._failpoints.hit(Point.DECODE_FINISH)
                self._handoff.finish(output.key, self.decoding.pop(output.key).answer)
                self._kept.ended(output.key, output.ending)
        for session, event in messages.step_outputs(outputs, self._kept.holder).items():
            self._sessions.send(session, event)
