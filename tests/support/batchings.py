"""Random ways to serve the same prompts, each compared to the bit with a prompt served alone.

A Batching plays two workers. The prefill worker runs the prompts in random chunks, beside random
others; at a random token a sequence's KV is copied to the decode worker, into other blocks, which
goes on token by token. Some sequences go back: a worker is lost, and prompt and answer are
prefilled again.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from kernel_cases import spoil

from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice
from kvrelay.kv.pool import KVPool

FIRST_TOKEN, LAST_TOKEN = 5, 270  # of the tiny models, without the special ones
CHUNKS = (1, 1, 2, 3, 7, 16, 40, 1000)


class Worker:
    """A runner and a pool full of somebody's litter, whose blocks are given out at random."""

    def __init__(self, runner: ModelRunner, blocks: int) -> None:
        self.runner, self.pool = runner, KVPool(runner.layout, blocks)
        spoil(self.pool)
        runner.attach(self.pool)
        self.free = list(range(blocks))

    def take(self, rng: random.Random, tokens: int) -> list[int]:
        needed = self.pool.layout.blocks_for(tokens)
        taken = rng.sample(self.free, needed)
        self.free = [block for block in self.free if block not in taken]
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        self.pool.bytes[list(blocks)] = 255  # no numbers, whatever the type
        self.free.extend(blocks)

    def alone(self, tokens: Sequence[int], rng: random.Random) -> torch.Tensor:
        """`[tokens, vocab]`: the whole prompt in one step of its own."""
        blocks = self.take(rng, len(tokens))
        logits = self.runner.logits([Slice(tokens, 0, blocks)]).clone()
        self.give_back(blocks)
        return logits


@dataclass
class Served:
    """One prompt on its way."""

    tokens: list[int]
    expected: torch.Tensor  # [tokens, vocab]
    worker: Worker
    moves_at: int  # tokens after which its KV goes to the other worker; more than it has: never
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    goes_back_at: int = -1  # tokens after which all of it is prefilled again; -1: never


class Batching:
    """One random way, drawn by `seed`, through a prefill and a decode worker of the same model."""

    def __init__(self, prefill: Worker, decode: Worker, seed: int, lengths: Sequence[int]) -> None:
        self._prefill, self._decode = prefill, decode
        self._rng = rng = random.Random(seed)
        self._live: list[Served] = []
        for _ in range(rng.randint(1, 5)):
            count = rng.choice(lengths)
            tokens = rng.choices(range(FIRST_TOKEN, LAST_TOKEN), k=count)
            served = Served(tokens, prefill.alone(tokens, rng), prefill, rng.randint(1, 2 * count))
            if rng.random() < 0.3:
                served.goes_back_at = rng.randint(1, count)
            served.blocks = prefill.take(rng, count)
            self._live.append(served)

    def run(self) -> None:
        """AssertionError where a token's logits are not those of its prompt served alone."""
        while self._live:
            for worker in (self._prefill, self._decode):
                self._step(worker, [s for s in self._live if s.worker is worker])
            for served in self._live:
                self._after(served)
            for served in [s for s in self._live if s.done == len(s.tokens)]:
                served.worker.give_back(served.blocks)
                self._live.remove(served)

    def _step(self, worker: Worker, candidates: list[Served]) -> None:
        rng = self._rng
        parts = []
        single = rng.random() < 0.3  # all of them decode steps
        for served in rng.sample(candidates, rng.randint(0, len(candidates))):
            size = 1 if single or worker is self._decode else rng.choice(CHUNKS)
            end = min(served.done + size, len(served.tokens))
            parts.append((served, served.done, end))
            served.done = end
        if not parts:
            return
        slices = [Slice(s.tokens[start:end], start, s.blocks) for s, start, end in parts]
        expected = [s.expected[start:end] for s, start, end in parts]
        if rng.random() < 0.5:
            ours = worker.runner.logits(slices)
        else:
            wanted = [rng.random() < 0.7 for _ in parts]
            ours = worker.runner.step(slices, wanted)
            kept = zip(expected, wanted, strict=True)
            expected = [rows[-1:] for rows, want in kept if want]
        whole = torch.cat(expected) if expected else torch.empty(0, ours.shape[1])
        assert torch.equal(ours, whole), [(start, end) for _, start, end in parts]

    def _after(self, served: Served) -> None:
        if served.worker is self._prefill and served.moves_at <= served.done < len(served.tokens):
            self._move(served)
        elif 0 <= served.goes_back_at <= served.done < len(served.tokens):
            served.worker.give_back(served.blocks)
            served.worker, served.done, served.goes_back_at = self._prefill, 0, -1
            served.moves_at = len(served.tokens)
            served.blocks = self._prefill.take(self._rng, len(served.tokens))

    def _move(self, served: Served) -> None:
        """As the transport does it: the blocks' bytes, whole."""
        there = self._decode.take(self._rng, len(served.tokens))
        self._decode.pool.bytes[there] = self._prefill.pool.bytes[served.blocks]
        self._prefill.give_back(served.blocks)
        served.worker, served.blocks = self._decode, there
