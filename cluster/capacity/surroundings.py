"""What every part of one simulated cluster shares, and how its messages travel."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.capacity.device import DeviceProfile
from cluster.simulation.loop import Timeline
from kvrelay.announcer import Announcer
from kvrelay.config import PROTOCOL_VERSION, RouterConfig, WorkerConfig
from kvrelay.engine.step_cost import StepCost, StepFit
from kvrelay.kv.block_journal import BlockJournal
from kvrelay.kv.layout import KVLayout
from kvrelay.rpc import RouterSession
from kvrelay.wire import worker_pb2

if TYPE_CHECKING:
    from cluster.capacity.decode import SimDecode
    from cluster.capacity.router import SimRouter

NOWHERE = Path("simulated")
KEY = "simulated-cluster-key"
STAMPS_A_SECOND = 100_000  # see `Surroundings.stamp`


@dataclass
class Surroundings:
    """together: tokens of steps that nobody joins or leaves are made, and sent, as one."""

    timeline: Timeline
    profile: DeviceProfile
    layout: KVLayout
    kv_blocks: int  # of each worker
    ms_per_block: float  # of a hand-off
    hand_off_ms: float
    network_s: float  # one way, between router and worker
    worker: WorkerConfig
    router: RouterConfig
    together: bool
    prompt_tokens: Callable[[str], int]  # of a request, by its id
    routers: "dict[str, SimRouter]" = field(default_factory=dict)
    decode: "dict[str, SimDecode]" = field(default_factory=dict)

    @property
    def now_ms(self) -> float:
        return self.timeline.now_s * 1000

    def stamp(self, at_s: float) -> int:
        """The token that is made at that time: its id says when, so that the token log is a record
        of times."""
        return round(at_s * STAMPS_A_SECOND)


class SimSession(RouterSession[Any]):
    """A session that is no stream: events arrive at the router a while later, in order. What is
    said at one time arrives as one entry of the timeline."""

    def __init__(self, around: Surroundings, worker: Any, router: str) -> None:
        self.open = True
        self.router = router
        self._worker = worker
        self._timeline = around.timeline
        self._delay_s = around.network_s
        self._hear = around.routers[router].heard
        self._said_s = -1.0  # the last time
        self._saying: list[Any] = []  # then

    def send(self, event: Any) -> None:
        if not self.open:
            return
        now_s = self._timeline.now_s
        if now_s == self._said_s and self._saying:
            self._saying.append(event)
            return
        self._said_s, self._saying = now_s, [event]
        self._timeline.put(now_s + self._delay_s, None, partial(self._arrive, self._saying))

    def end(self) -> None:
        self.open = False

    def _arrive(self, events: list[Any]) -> None:
        said, worker, hear = events[:], self._worker, self._hear
        events.clear()  # what comes at this time from now on arrives by itself
        for event in said:
            hear(worker, event)


class Speaker:
    """When a worker's announcer speaks (`Announcer.run`), without a task for it."""

    def __init__(
        self, timeline: Timeline, announcer: Announcer[Any], journal: BlockJournal
    ) -> None:
        self._timeline = timeline
        self._announcer = announcer
        self._spoke_s = timeline.now_s
        self._due = False  # news are on the timeline
        self._silent = False  # for ever
        journal.on_news = self._on_news
        timeline.put(timeline.now_s + announcer.silence_s, None, self._beat)

    def stop(self) -> None:
        self._silent = True

    def _on_news(self) -> None:
        """At once after a quiet time, else when enough has gathered."""
        if not self._due:
            self._due = True
            self._timeline.put(self._spoke_s + self._announcer.gather_s, None, self._speak)

    def _speak(self) -> None:
        if not self._silent:
            self._due = False
            self._spoke_s = self._timeline.now_s
            self._announcer.speak()

    def _beat(self) -> None:
        if self._silent:
            return
        silence_s = self._announcer.silence_s
        if self._timeline.now_s - self._spoke_s >= silence_s - 1e-9:
            self._speak()
        self._timeline.put(self._spoke_s + silence_s, None, self._beat)


class CostWord:
    """What a worker says of its steps; made anew when its fit has changed."""

    def __init__(self, fit: StepFit) -> None:
        self._fit = fit
        self._of: StepCost | None = None
        self._word = worker_pb2.StepCost()

    def __call__(self) -> worker_pb2.StepCost:
        cost = self._fit.cost
        if cost is not self._of:
            self._of = cost
            self._word = worker_pb2.StepCost(
                base_ms=cost.base_ms,
                ms_per_prompt_token=cost.ms_per_prompt_token,
                ms_per_sequence=cost.ms_per_sequence,
            )
        return self._word


_FIT_ALL = 8  # of a worker's steps of a kind its fit is told the first,
_FIT_EVERY = 16  # then one of so many: simulated steps do not scatter, and a fit is dear


class Measuring:
    """Tells a worker's fit of its steps, as EngineHost does; of those that it knows, of some."""

    def __init__(self, fit: StepFit) -> None:
        self._fit = fit
        self._seen: dict[tuple[int, int], int] = {}  # by about how many tokens and sequences

    def step(self, prompt_tokens: int, sequences: int, step_ms: float) -> None:
        """All that have both, for chunks of prompts beside answers go by the last of them."""
        kind = prompt_tokens.bit_length(), sequences.bit_length()
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        both = prompt_tokens > 0 and sequences > 0
        if both or seen <= _FIT_ALL or seen % _FIT_EVERY == 0:
            self._fit.measured(prompt_tokens, sequences, step_ms)


def info(around: Surroundings, name: str, chunk_tokens: int) -> worker_pb2.WorkerInfo:
    """What EngineHost.info says of a real worker."""
    return worker_pb2.WorkerInfo(
        protocol_version=PROTOCOL_VERSION,
        instance_id=name,
        layout=around.layout.to_wire(),
        blocks_total=around.kv_blocks,
        max_model_tokens=around.kv_blocks * around.layout.block_size,
        chunk_tokens=chunk_tokens,
    )
