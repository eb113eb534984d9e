"""An engine in a process of its own, as a worker has it.

Started by engines.py with `-m`. The first line of stdin is an EngineSetup; it answers with a line
that says what the model is. Then it reads one command a line and answers each, all JSON:

  {"do": "pool", "blocks": N}               a pool of so many blocks
  {"do": "step", "shape": S, "turn_s": T}   {"ms": [...]} of one step after another, for T seconds
  {"do": "busy", "shape": S}                one step after another from now on
  {"do": "rest"}                            no more
"""

import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from cluster.bench.report import BenchError
from cluster.cores import pin
from cluster.profiling.setup import EngineInfo, EngineSetup
from cluster.profiling.steps import StepShape

_WARM_UP_STEPS = 1  # of each turn: the step before was another one's


class _Busy:
    """One step after another on a thread of its own, until told to rest."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._resting = threading.Event()
        self._thread = threading.Thread(target=self._run, name="busy", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        self._resting.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._resting.is_set():
            self._step()


class _Engine:
    """runner, pool: of kvrelay/engine; named here without importing torch."""

    def __init__(self, runner: Any, pool: Any, vocab: int) -> None:
        self._runner = runner
        self._vocab = vocab
        self._dice = random.Random(0)
        # In no order, as the blocks of a worker that has served for a while.
        self._blocks = self._dice.sample(range(pool.blocks), pool.blocks)

    def step(self, shape: StepShape) -> Callable[[], object]:
        """Does one, up to the tokens chosen: of every sequence, and of each prompt the first."""
        from kvrelay.engine.sampling import sample
        from kvrelay.engine.sampling_params import SamplingParams

        slices = list(self._slices(shape))
        wanted = [True] * len(slices)
        greedy = SamplingParams(0, 0, 1, seed=0, max_tokens=1, eos_token_ids=frozenset())
        return lambda: sample(
            self._runner.step(slices, wanted), [greedy] * len(slices), [0] * len(slices)
        )

    def _slices(self, shape: StepShape) -> Iterator[Any]:
        from kvrelay.engine.step import Slice

        each = [*shape.chunks, *[(1, shape.context)] * shape.sequences]
        at = 0
        assert shape.blocks(self._runner.layout) <= len(self._blocks)
        for tokens, start in each:
            count = self._runner.layout.blocks_for(start + tokens)
            text = [self._dice.randrange(self._vocab) for _ in range(tokens)]
            yield Slice(text, start, self._blocks[at : at + count])
            at += count


def _timed_ms(step: Callable[[], object], turn_s: float) -> list[float]:
    """One at least."""
    for _ in range(_WARM_UP_STEPS):
        step()
    taken: list[float] = []
    end_s = time.perf_counter() + turn_s
    while not taken or time.perf_counter() < end_s:
        began_s = time.perf_counter()
        step()
        taken.append((time.perf_counter() - began_s) * 1000)
    return taken


def _serve(engine: _Engine, answer: Callable[[dict[str, Any]], None]) -> None:
    """Until stdin ends."""
    busy: _Busy | None = None
    try:
        for line in sys.stdin:
            command = json.loads(line)
            match command["do"]:
                case "step":
                    step = engine.step(StepShape.from_json(command["shape"]))
                    answer({"ms": _timed_ms(step, command["turn_s"])})
                case "busy":
                    busy = _Busy(engine.step(StepShape.from_json(command["shape"])))
                    answer({})
                case "rest":
                    assert busy is not None
                    busy.rest()
                    busy = None
                    answer({})
    finally:
        if busy is not None:
            busy.rest()


def _main(setup: EngineSetup, say: Callable[[str], None]) -> None:
    if setup.cores:
        pin(setup.cores)  # before torch is imported: its threads take over what they find
    import torch

    from cluster.bench.loading import EngineChoice, attached_pool, loaded_runner, outline
    from cluster.preparation import silent

    torch.set_num_threads(1)  # the engine's threads are its own, as in a worker
    config = outline(setup.path).config.get_text_config()
    choice = EngineChoice(setup.quantize, setup.kv_dtype, setup.threads)
    with loaded_runner(setup.path, choice, silent) as runner:
        ends = (getattr(config, "max_position_embeddings", None), runner.context_limit)
        positions_max = min((end for end in ends if end), default=None)
        say(EngineInfo(runner.layout, positions_max, runner.description).to_json())
        blocks = json.loads(sys.stdin.readline())["blocks"]
        with attached_pool(runner, blocks) as pool:
            say("{}")
            engine = _Engine(runner, pool, config.vocab_size)
            _serve(engine, lambda found: say(json.dumps(found)))


def _own_stdout() -> TextIO:
    """For answers alone: what else is written to stdout goes to stderr from now on."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def _run() -> None:
    answers = _own_stdout()

    def say(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    setup = EngineSetup.from_json(sys.stdin.readline())
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            _main(setup, say)
        except BenchError as error:
            say(f"failed: {error}")


if __name__ == "__main__":
    _run()
