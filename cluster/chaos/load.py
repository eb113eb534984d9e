"""The clients of `kvrelay chaos`: they ask, note when tokens come, and compare every answer.

Started by run.py as `python -m cluster.chaos.load`, in a process of its own, so that its pauses are
not those of who strikes the cluster. Each line of stdin is a command, a JSON object, which is
answered with one:

  {"do": "open", ...}                    connects, makes the asks; the arguments are those of Plan
  {"do": "reference", "first": A, "count": N}   asks so many of them for their right answers
  {"do": "begin"}                        asks them at random from now on
  {"do": "progress"}                     what has come so far
  {"do": "end"}                          asks no more, waits for what runs; all that was seen
"""

import asyncio
import random
import signal
from array import array
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.bench.answering import answer_lines
from cluster.chaos.answers import Answer, difference
from cluster.chaos.asking import ANSWER_S, Asking, LostError, now_s
from cluster.chaos.asks import MIXES, Ask, make_asks
from cluster.chaos.streams import Stream
from kvrelay.client import KvrelayError

_GRACE_S = 5.0


class Plan(BaseModel):
    """What is asked, how much of it and where. `mix` is one of MIXES."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grpc: tuple[str, ...]
    http: tuple[str, ...]
    seed: int
    mix: str
    rate: float  # requests a second
    asks: int = 64  # different ones
    streams_max: int = 24  # at once: who is due then comes later
    clump_max: int = 8  # requests come together, up to so many
    http_share: float = 0.2
    cancel_share: float = 0.1  # of requests, whose client has enough before the end


class Load:
    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._running: set[asyncio.Task[None]] = set()
        self._right: dict[int, Answer] = {}
        self._gaps_s = array("d")
        self._tokens = 0

    async def open(self, **plan: Any) -> dict[str, Any]:
        self._plan = Plan.model_validate(plan)
        self._asking = Asking(self._plan.grpc, self._plan.http)
        (model,) = await self._asking.client.models()
        self._asks = make_asks(
            self._plan.asks,
            self._plan.seed,
            MIXES[self._plan.mix],
            vocab_size=model.vocab_size,
            tokens_max=model.max_model_tokens,
            chats=model.has_chat_template,
            http_share=self._plan.http_share,
        )
        return {"asks": [{**asdict(ask), "kind": ask.kind} for ask in self._asks]}

    async def reference(self, first: int, count: int) -> dict[str, Any]:
        asks = self._asks[first : first + count]
        names = [f"right-{ask.number}" for ask in asks]
        asked = zip(asks, names, strict=True)
        answers = await asyncio.gather(*(self._asking.reference(*each) for each in asked))
        self._right |= {ask.number: one for ask, one in zip(asks, answers, strict=True)}
        return {}

    async def begin(self) -> dict[str, Any]:
        self._asking.came = self._came
        self._arriving = asyncio.create_task(self._arrive())
        return {}

    async def progress(self) -> dict[str, Any]:
        self._check()
        ended = len(self._streams) - len(self._running)
        return {"tokens": self._tokens, "running": len(self._running), "ended": ended}

    async def end(self) -> dict[str, Any]:
        self._check()
        self._arriving.cancel()
        if self._running:  # each gives up in time by itself
            await asyncio.wait(self._running, timeout=ANSWER_S + _GRACE_S)
        await self._asking.close()
        gaps_s = sorted(self._gaps_s)
        return {
            "streams": [_shown(stream) for stream in self._streams],
            "itl_p50_ms": 1000 * percentile(gaps_s, 50),
            "itl_p99_ms": 1000 * percentile(gaps_s, 99),
        }

    def _check(self) -> None:
        """Raises what has ended the asking: without a load nothing is shown."""
        if self._arriving.done():
            self._arriving.result()

    async def _arrive(self) -> None:
        """In clumps, so that many run side by side although they are soon done; for as long as not
        too many run."""
        plan = self._plan
        dice = random.Random(plan.seed)
        due_s = now_s()
        while True:
            clump = dice.randint(1, plan.clump_max)
            due_s = max(now_s(), due_s + clump * dice.expovariate(plan.rate))
            await asyncio.sleep(due_s - now_s())
            for _ in range(clump):
                while len(self._running) >= plan.streams_max:
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                self._start(dice)

    def _start(self, dice: random.Random) -> None:
        ask = dice.choice(self._asks)
        enough = 1 << 31
        if dice.random() < self._plan.cancel_share:
            enough = dice.randint(1, ask.options["max_tokens"])
        stream = Stream(len(self._streams), ask.number, now_s())
        self._streams.append(stream)
        task = asyncio.create_task(self._one(ask, stream, enough))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _one(self, ask: Ask, stream: Stream, enough: int) -> None:
        request_id = f"chaos-{self._plan.seed}-{stream.number}"
        try:
            answer = await self._asking.ask(ask, stream, request_id, enough)
        except LostError as error:
            stream.outcome, stream.trouble = "lost", str(error)
        except Exception as error:  # whatever it is, the client has no answer
            stream.outcome, stream.trouble = "lost", f"{type(error).__name__}: {error}"
        else:
            stream.outcome = "cancelled" if answer.cut else "answered"
            stream.trouble = ""
            if (found := difference(self._right[ask.number], answer)) is not None:
                stream.outcome, stream.trouble = found.kind, found.what
        finally:
            stream.end(now_s())

    def _came(self, stream: Stream, tokens: int) -> None:
        gap_s = stream.came(now_s(), tokens)
        self._tokens += tokens
        if gap_s is not None:
            self._gaps_s.append(gap_s)


def percentile(ordered: "list[float]", percent: float) -> float:
    """Of values in order; 0 where there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def _shown(stream: Stream) -> dict[str, Any]:
    """Its public fields."""
    return {name: value for name, value in vars(stream).items() if not name.startswith("_")}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it ends with its stdin
    asyncio.run(answer_lines(Load, (KvrelayError, OSError)))
