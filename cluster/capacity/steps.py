"""The steps of a simulated decode worker: one after another, for whoever is in the batch and for
prompts, as decode_worker/step_loop.py makes them. Used by decode.py.

Two ways to play them. Together: a run of steps that nobody joins or leaves is one entry on the
timeline, and each sequence's tokens go to its router in two messages, the first and the rest.
Each by itself, as the real worker does: wherever there are more sequences than a step takes,
and everywhere when the surroundings say so. Both make the same tokens at the same times.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.capacity.device import attended
from cluster.capacity.engine import Engine, Host
from cluster.capacity.played import Played
from cluster.capacity.surroundings import Measuring, Surroundings
from decode_worker import messages
from decode_worker.batch import Batch, Ending, Output, Running
from decode_worker.handoff import HandOff
from decode_worker.making import make_prompts
from decode_worker.prompts import LocalPrompt
from decode_worker.reservation import Key, ReservationEvent
from decode_worker.slack import Slack
from decode_worker.step import DecodeStep
from kvrelay.engine.step_cost import StepFit
from kvrelay.engine.turns import Chunk
from kvrelay.wire.worker_pb2 import DecodeEvent


class SimSteps:
    """send: gives a router's session an event; freed: there may be more blocks than before."""

    def __init__(
        self,
        around: Surroundings,
        host: Host | None,
        handoff: HandOff,
        send: Callable[[Any, DecodeEvent], None],
        freed: Callable[[], None],
    ) -> None:
        config = around.worker
        self.batch = Batch(config.batch_max)
        self.prompts = make_prompts(config, around.layout, handoff)
        self.fit = StepFit()
        self._slack = Slack(config.tpot_target_ms)
        self.handoff = handoff
        self._around = around
        self._send = send
        self._freed = freed
        self._engine = Engine(around.timeline, host, around.profile.busy_neighbour.decode)
        self._together = around.together and self._engine.alone
        self._measure = Measuring(self.fit)
        self._played = Played(around.stamp)
        # What the engine does now
        self._step = DecodeStep()  # in a run, without the running sequences
        self._planned = 0  # steps of the run; 0: no run, but one step
        self._sequences = self._context = 0  # at its first step
        self._step_ms = 0.0  # the mean
        self._leaving: dict[Key, None] = {}  # let go of while it goes on

    def __len__(self) -> int:
        """Sequences that are answered."""
        return len(self._played.sequences)

    def join(self, sequence: Running, first_token: int) -> None:
        """A sequence whose prompt has come as a whole."""
        self._slack.received()
        self._publish([self._join(sequence, first_token)])
        self._freed()
        self.go_on()

    def prompt_came(self) -> None:
        """There is one more in `prompts`: the next step has a chunk of it."""
        if self._planned:
            self._cut()
        self.go_on()

    def let_go(self, key: Key, why: ReservationEvent) -> int | None:
        """As StepLoop.let_go."""
        computing = self._engine.busy and (
            key in self._played.sequences or any(c.job.key == key for c in self._step.chunks)
        )
        self.batch.leave(key)
        self.prompts.leave(key)
        if key in self._played.sequences and self._planned:
            self._cut()
        answer = self._played.leave(key) or ()
        transfer_id = self.handoff.abort(key, why, answer, in_step=computing)
        if computing:
            self._leaving[key] = None
        self._freed()
        return transfer_id

    def stop(self) -> None:
        """For ever. The tokens of the steps that had ended are on their way."""
        if self._planned:
            self._played.ended(self._times(self._steps_by_now()), self._sequences)
        for playing in self._played.sequences.values():
            self._played.catch_up(playing)
        self._say([_so_far(p.running) for p in self._played.sequences.values()])
        self._engine.stop()

    def go_on(self) -> None:
        """Begins the next step, or several in a row, unless one runs."""
        if self._engine.busy:
            return
        together = self._together and not self._in_turns
        if together:
            self._played.go_on()
            running, sequences = [], len(self.batch)
        else:
            self._played.settle()
            running = self.batch.next_step()
            sequences = len(running)
        chunks = self._chunks(running, sequences)
        if not sequences and not chunks:
            return
        self._begin_chunks(chunks)
        self._step, self._sequences = DecodeStep(running, chunks), sequences
        step = self._around.profile.step
        if together:
            self._context = self._played.context
            self._planned = self._played.left() if not chunks else 1
        else:
            self._context = sum(s.prompt_tokens + len(s.answer) for s in running)
        if self._planned > 1:
            ms = step.decode_ms(sequences, self._context, self._planned)
        else:
            tokens = sum(chunk.count for chunk in chunks)
            looked_at = sum(attended(chunk.count, chunk.start) for chunk in chunks)
            ms = step.ms(tokens, looked_at, sequences, self._context)
        self._step_ms = ms / max(1, self._planned)
        self._engine.start(ms, self._done)

    @property
    def _in_turns(self) -> bool:
        """Whether the next step depends on how each sequence stands."""
        if len(self.batch) > self._around.worker.batch_max:
            return True
        return len(self.prompts) > 0 and self._slack.target_ms > 0

    def _chunks(self, running: Sequence[Running], sequences: int) -> list[Chunk[LocalPrompt]]:
        if not len(self.prompts):
            return []
        coming = len(self.handoff) - len(self) - len(self.prompts)
        room = self._slack.room(running, self._around.now_ms, self.fit, coming)
        return self.prompts.next_chunks(sequences, self.fit, room)

    def _begin_chunks(self, chunks: Sequence[Chunk[LocalPrompt]]) -> None:
        for chunk in chunks:
            if chunk.is_first:
                chunk.job.started_s = self._around.timeline.now_s
                self._send(chunk.job.key[0], messages.started(chunk.job))

    def _done(self) -> None:
        step, steps = self._step, self._planned
        self._step, self._planned = DecodeStep(), 0
        self._note_cost(step.chunks)
        if steps:
            last = self._ended(self._times(steps, step))
            outputs = self.batch.apply(last, [self._played.last()] * len(last))
        else:
            token = self._around.stamp(self._around.timeline.now_s)
            outputs = self.batch.apply(step.running, [token] * self._sequences)
        self._engine_idle()
        for chunk in step.chunks:
            if self.prompts.computed(chunk):
                outputs += self._chunk_done(chunk)
        self._publish(outputs)
        self._freed()
        self.go_on()

    def _ended(self, times_s: Sequence[float]) -> list[Running]:
        """The steps of a run have ended. Whose last token is to be added now: those that end, or,
        when somebody has joined for whom there is no room, all, for then turns begin."""
        played = self._played
        ended = played.ended(times_s, self._sequences)
        if len(self.batch) > self._around.worker.batch_max:
            every = [played.sequences[running.key] for running in self.batch.next_step()]
            ended = [playing for playing in every if playing.first < played.steps]
            for playing in ended:
                played.catch_up(playing, but=1)
        return [playing.running for playing in ended]

    def _note_cost(self, chunks: Sequence[Chunk[LocalPrompt]]) -> None:
        """As EngineHost counts: one token of a prompt costs what one of an answer does."""
        ones = sum(chunk.count == 1 for chunk in chunks)
        tokens = sum(chunk.count for chunk in chunks) - ones
        self._measure.step(tokens, self._sequences + ones, self._step_ms)

    def _engine_idle(self) -> None:
        """Frees what was let go of meanwhile."""
        self.handoff.engine_moved(self._around.now_ms)
        if self._leaving:
            for key in self._leaving:
                if self.handoff.is_aborting(key):
                    self.handoff.engine_idle(key)
            self._leaving.clear()
            if self._played.behind:
                self._played.recount()

    def _times(self, steps: int, of: DecodeStep | None = None) -> list[float]:
        """When each of the first steps of the run ends."""
        began_s = self._engine.began_s
        if (of or self._step).chunks:
            return [began_s + self._step_ms / 1000] * steps
        step = self._around.profile.step
        first_ms = step.ms(0, 0, self._sequences, self._context)
        if steps == 1:
            return [began_s + first_ms / 1000]
        more_ms = step.ms_per_context_token * self._sequences / 2
        return [
            began_s + (n * first_ms + more_ms * n * (n - 1)) / 1000 for n in range(1, steps + 1)
        ]

    def _steps_by_now(self) -> int:
        """Of the run, that have ended."""
        if self._step.chunks:
            return 0
        passed_ms = (self._around.timeline.now_s - self._engine.began_s) * 1000
        decode_ms = self._around.profile.step.decode_ms
        low, high = 0, self._planned
        while low < high:
            middle = (low + high + 1) // 2
            if decode_ms(self._sequences, self._context, middle) <= passed_ms:
                low = middle
            else:
                high = middle - 1
        return low

    def _joining_step(self) -> int:
        """The step in which somebody who joins now takes part first. A run ends before it."""
        if not self._planned:
            return self._played.steps
        return self._played.steps + self._cut()

    def _cut(self) -> int:
        """Ends the run with the step that runs now. How many steps it has then."""
        steps = min(self._steps_by_now() + 1, self._planned)
        if steps < self._planned:
            self._planned = steps
            step = self._around.profile.step
            ms = step.decode_ms(self._sequences, self._context, steps)
            self._step_ms = ms / steps
            self._engine.cut(ms)
        return steps

    def _join(self, sequence: Running, first_token: int) -> Output:
        sequence.begun_ms = self._around.now_ms
        self._played.join(sequence, self._joining_step())
        return self.batch.join(sequence, first_token)

    def _chunk_done(self, chunk: Chunk[LocalPrompt]) -> list[Output]:
        prompt = chunk.job
        self.handoff.share_prompt(prompt.key, prompt.computed)
        if not chunk.is_last:
            return []
        now_s = self._around.timeline.now_s
        token = self._around.stamp(now_s)
        self.handoff.computed(prompt.key)
        prefill_ms = (now_s - prompt.started_s) * 1000
        self._send(prompt.key[0], messages.first_token(prompt, token, prefill_ms))
        sequence = Running(
            key=prompt.key,
            prompt_tokens=len(prompt.prompt),
            sampling=prompt.sampling,
            blocks=prompt.blocks,
        )
        return [self._join(sequence, token)]

    # ---- ends, and what routers hear

    def _publish(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.ending is not Ending.NONE:
                answer = self._played.sequences[output.key].running.answer
                self.handoff.finish(output.key, answer)
        self._say(outputs)
        for output in outputs:
            if output.ending is not Ending.NONE:
                self._played.leave(output.key)

    def _say(self, outputs: Sequence[Output]) -> None:
        """One message for each router: all tokens up to these that it has not been told."""
        by_session: dict[Any, DecodeEvent] = {}
        for output in outputs:
            session, number = output.key
            playing = self._played.sequences[output.key]
            first, playing.sent = playing.sent, output.offset + 1
            event = by_session.get(session)
            if event is None:
                event = by_session[session] = DecodeEvent()
            event.step.outputs.add(
                key=number,
                offset=first,
                token_ids=playing.running.answer[first : playing.sent],
                ending=messages.ENDINGS[output.ending],
            )
        for session, event in by_session.items():
            self._send(session, event)


def _so_far(running: Running) -> Output:
    """Its newest token."""
    return Output(running.key, len(running.answer) - 1, running.answer[-1], Ending.NONE)
