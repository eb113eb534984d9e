"""One run of `kvrelay chaos` in its order: cluster, references, load and faults, check, end.

Called by the command. One loop here strikes, looks and samples; the supervisor of the cluster has a
thread of its own, the clients a process (load.py).
"""

import contextlib
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.bench.machine import describe_machine
from cluster.bench.report import BenchError
from cluster.bench.router_processes import Child
from cluster.chaos.asking import now_s
from cluster.chaos.faults import KINDS, Course, faults
from cluster.chaos.goals import Goals, goals
from cluster.chaos.leaks import before, find_leaks, left_behind
from cluster.chaos.load import Plan
from cluster.chaos.model import TINY
from cluster.chaos.outcome import Moment, Outcome
from cluster.chaos.processes import Processes
from cluster.chaos.roll import Roll
from cluster.chaos.samples import Growth, Samples
from cluster.chaos.siege import Siege
from cluster.chaos.streams import Stream
from cluster.chaos.supervisor import Supervisor, supervised
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.serving import Serving
from cluster.weights import pack_weights
from kvrelay.cache import default_cache
from kvrelay.config import Transport

_KV_GIB = 0.0625  # of each worker: little to fill, so that cached blocks are evicted as well
_DRAIN_S = 5.0
_REFERENCES_AT_ONCE = 4
_STEP_S = 0.05
_MOMENT_S = 0.5
_SAMPLE_S = 5.0
_SAMPLES_MIN = 24
_WARM_UP_SHARE = 0.25  # of a soak: growth in it is no leak
_WHOLE_MAX_S = 90.0  # after a fault, and before the first
_LEAKS_S = 60.0  # longer than decode workers keep answers of a router that is gone


@dataclass(frozen=True)
class Chaos:
    """What is run. `kill_every_s` 0: no faults. `soak`: short requests, and memory is sampled."""

    model: str
    minutes: float
    kill_every_s: float
    seed: int
    prefill: int
    decode: int
    routers: int
    transport: Transport
    rate: float
    soak: bool
    kinds: Sequence[str] = KINDS
    asks: int = 64

    @property
    def play_again(self) -> str:
        """The command that runs it again."""
        options = {
            "minutes": self.minutes,
            "kill-every": self.kill_every_s,
            "seed": self.seed,
            "prefill": self.prefill,
            "decode": self.decode,
            "routers": self.routers,
            "transport": self.transport,
            "rate": self.rate,
        }
        words = [f"--{name} {_plain(value)}" for name, value in options.items()]
        chosen = [f"--fault {kind}" for kind in self.kinds] if set(self.kinds) != set(KINDS) else []
        named = [] if self.model == TINY else [shlex.quote(self.model)]
        soak = ["--soak"] if self.soak else []
        return " ".join(["kvrelay chaos", *named, *soak, *words, *chosen])

    @property
    def counts(self) -> dict[str, int]:
        """Processes of each role."""
        return {"prefill": self.prefill, "decode": self.decode, "router": self.routers}

    @property
    def goals(self) -> Goals:
        return goals(
            seconds=60 * self.minutes,
            rate=self.rate,
            kill_every_s=self.kill_every_s,
            soak=self.soak,
            counts=self.counts,
            struck={kind.partition("-")[2] for kind in self.kinds} if self.kill_every_s else (),
        )


def run_chaos(model: PreparedModel, asked: Chaos, on_progress: Progress) -> Outcome:
    """Raises BenchError when the cluster or the load cannot start, or goes on no more."""
    pack_weights(model.path, "none", default_cache(), on_progress)
    try:
        options = _options(asked)
        machine = _machine(model, asked, options)
        outcome = Outcome(machine, asked.play_again, goals=asked.goals)
        unstarted = Serving(model, options)
        processes = Processes(unstarted, asked.counts)
        with (
            _served(unstarted, on_progress) as serving,
            supervised(serving) as supervisor,
            _load() as load,
        ):
            _Run(serving, processes, supervisor, load, asked, outcome, on_progress).run()
    except ServeError as error:
        raise BenchError(str(error)) from error
    outcome.leaks.processes += left_behind(processes)
    return outcome


class _Run:
    def __init__(
        self,
        serving: Serving,
        processes: Processes,
        supervisor: Supervisor,
        load: Child,
        asked: Chaos,
        outcome: Outcome,
        on_progress: Progress,
    ) -> None:
        self._serving = serving
        self._supervisor = supervisor
        self._load = load
        self._asked = asked
        self._outcome = outcome
        self._on_progress = on_progress
        self._processes = processes
        self._roll = Roll()
        self._processes.leave_out(load.pid)
        self._samples = Samples()

    def run(self) -> None:
        self._references()
        self._wait_until_whole()
        then = before(self._processes)
        self._load.ask("begin")
        start_s = now_s()
        self._besiege(start_s)
        self._on_progress("waiting for the last answers", None)
        self._take_answers(self._load.ask("end"))
        self._on_progress("looking for what is left", None)
        self._outcome.leaks = find_leaks(self._serving, self._processes, then, _LEAKS_S)
        self._supervisor.check()
        self._roll.look(self._processes.living(), now_s())
        self._outcome.deaths = self._roll.deaths(self._outcome.strikes, start_s)
        self._outcome.growth = self._growth(start_s)

    def _growth(self, start_s: float) -> list[Growth]:
        """With faults, of those alone that none meets."""
        asked = self._asked
        warm_s = start_s + _WARM_UP_SHARE * asked.minutes * 60
        found = self._samples.growth(warm_s, of_memory=not asked.kill_every_s)
        return [
            each for each in found if not asked.kill_every_s or each.name in asked.goals.growths
        ]

    def _references(self) -> None:
        asked = self._asked
        addresses = self._serving.routers.addresses
        plan = Plan(
            grpc=tuple(each.grpc for each in addresses),
            http=tuple(each.http for each in addresses),
            seed=asked.seed,
            mix="soak" if asked.soak else "chaos",
            rate=asked.rate,
            asks=asked.asks,
        )
        self._outcome.asks = self._load.ask("open", **plan.model_dump())["asks"]
        for first in range(0, asked.asks, _REFERENCES_AT_ONCE):
            self._on_progress("asking for the right answers", first / asked.asks)
            self._load.ask("reference", first=first, count=_REFERENCES_AT_ONCE)

    def _wait_until_whole(self) -> None:
        deadline_s = now_s() + _WHOLE_MAX_S
        while not self._processes.are_whole():
            if now_s() > deadline_s:
                raise BenchError(f"not every process serves after {_WHOLE_MAX_S:g} s")
            time.sleep(_MOMENT_S)

    def _besiege(self, start_s: float) -> None:
        """Load and faults until the time is over and no fault lasts."""
        asked = self._asked
        end_s = start_s + asked.minutes * 60
        coming = faults(asked.kinds, asked.kill_every_s, asked.seed)
        siege = Siege(self._processes, Course(coming, start_s, _WHOLE_MAX_S))
        moment_s = sample_s = start_s
        stage = "load and faults" if asked.kill_every_s else "load"
        try:
            while (now := now_s()) < end_s or not siege.is_over:
                self._supervisor.check()
                may_strike = asked.kill_every_s and now < end_s
                siege.step(now, self._streams if may_strike else None)
                if now >= moment_s:
                    self._outcome.moments.append(self._moment(now))
                    moment_s = now + _MOMENT_S
                    self._on_progress(stage, min(1.0, (now - start_s) / (end_s - start_s)))
                if now >= sample_s:
                    self._samples.take(self._processes.names(), now)
                    sample_s = now + self._sample_every_s
                time.sleep(_STEP_S)
        finally:
            siege.close()
        self._outcome.strikes = siege.strikes

    @property
    def _sample_every_s(self) -> float:
        """Short runs are sampled more often: enough to see growth in."""
        return min(_SAMPLE_S, self._asked.minutes * 60 / _SAMPLES_MIN)

    def _streams(self) -> int:
        return int(self._load.ask("progress")["running"])

    def _moment(self, at_s: float) -> Moment:
        seen = self._load.ask("progress")
        self._roll.look(self._processes.living(), at_s)
        return Moment(at_s=at_s, alive=self._processes.alive(), **seen)

    def _take_answers(self, result: dict[str, Any]) -> None:
        self._outcome.streams = [Stream(**stream) for stream in result["streams"]]
        self._outcome.itl_ms = (result["itl_p50_ms"], result["itl_p99_ms"])


def _options(asked: Chaos) -> ServeOptions:
    return ServeOptions(
        prefill=asked.prefill,
        decode=asked.decode,
        routers=asked.routers,
        transport=asked.transport,
        port=0,
        http_port=0,
        kv_gib=_KV_GIB,
        drain_s=_DRAIN_S,
    )


@contextlib.contextmanager
def _served(serving: Serving, on_progress: Progress) -> Iterator[Serving]:
    try:
        serving.start(on_progress)
        yield serving
    finally:
        serving.stop()


@contextlib.contextmanager
def _load() -> Iterator[Child]:
    load = Child("the load", "cluster.chaos.load")
    try:
        load.ready()
        yield load
    finally:
        load.end()


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machine(model: PreparedModel, asked: Chaos, options: ServeOptions) -> dict[str, Any]:
    return {
        **describe_machine(options.threads_each),
        "model": model.name,
        "cluster": f"{asked.prefill} P + {asked.decode} D + {asked.routers} routers",
        "transport": asked.transport,
        "minutes": f"{asked.minutes:g}",
        "kill every": f"{asked.kill_every_s:g} s" if asked.kill_every_s else "never",
        "requests/s": f"{asked.rate:g}",
        "asks": asked.asks,
        "seed": asked.seed,
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
    }
