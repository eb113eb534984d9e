"""What one seed makes of a run: how large the cluster is, its limits, its load and its faults.

Everything is drawn here, from generators of its own for each part, so that a change of one part
leaves the others as they were. Limits are small and waits short, so that they are met.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from cluster.simulation.model import VOCAB, Ask
from cluster.simulation.network import Delays
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.engine.step_cost import StepCost

_NOWHERE = Path("simulated")
_KEY = "simulated-cluster-key"
_TRANSPORTS = (("tcp",), ("shm",), ("shm", "tcp"))


@dataclass(frozen=True)
class Arrival:
    """One request of a client. cancel_after: it goes away once it has so many tokens; cancel_s:
    after that time."""

    at_s: float
    ask: Ask
    cancel_after: int | None = None
    cancel_s: float | None = None


@dataclass(frozen=True)
class Shape:
    """How many of each, and how large their pools are."""

    routers: int
    prefill_blocks: tuple[int, ...]
    decode_blocks: tuple[int, ...]
    transports: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    seed: int
    shape: Shape
    worker: WorkerConfig
    router: RouterConfig
    cost: StepCost
    delays: Delays
    arrivals: tuple[Arrival, ...]
    shuffle: bool  # what happens at one time, in an order of the seed's
    faults_max: int


def generator(seed: int, part: str) -> Random:
    """Equal in every process: text is hashed the same way there."""
    return Random(f"{seed} {part}")


def draw(seed: int) -> Settings:
    rng = generator(seed, "settings")
    shape = _shape(rng)
    delays = Delays(
        most_s=rng.choice((0.001, 0.003, 0.01)),
        slow_share=rng.choice((0.0, 0.02, 0.1)),
        slow_s=rng.choice((0.05, 0.3)),
        keepalive_s=rng.choice((1.0, 3.0)),
    )
    cost = StepCost(rng.choice((1.0, 4.0)), rng.choice((0.1, 0.5)), rng.choice((0.2, 1.0)))
    ttft_ms, tpot_ms = _targets(generator(seed, "targets"))
    return Settings(
        seed,
        shape,
        _worker(rng).model_copy(update={"tpot_target_ms": tpot_ms}),
        _router(rng).model_copy(
            update={"ttft_target_ms": ttft_ms, "tpot_target_ms": tpot_ms, "late_wait_ms": 500}
        ),
        cost,
        delays,
        _arrivals(generator(seed, "arrivals"), shape),
        shuffle=rng.random() < 0.5,
        faults_max=rng.choice((0, 2, 4, 8, 16)),
    )


def _shape(rng: Random) -> Shape:
    prefill = rng.choice((0, 1, 1, 2, 2, 3))
    decode = rng.choice((1, 2, 2, 3))
    return Shape(
        routers=rng.choice((1, 1, 2)),
        prefill_blocks=tuple(rng.choice((10, 16, 30)) for _ in range(prefill)),
        decode_blocks=tuple(rng.choice((12, 20, 40)) for _ in range(decode)),
        transports=rng.choice(_TRANSPORTS),
    )


def _worker(rng: Random) -> WorkerConfig:
    return WorkerConfig(
        model_path=_NOWHERE,
        cluster_key=_KEY,
        socket_dir=_NOWHERE,
        chunk_tokens=rng.choice((4, 8, 32)),
        batch_max=rng.choice((1, 2, 8)),
        jobs_max=rng.choice((2, 64)),
        local_prompts_max=rng.choice((1, 64)),
        reservations_max=rng.choice((3, 64)),
        prefix_caching=rng.random() < 0.85,
        itl_target_ms=rng.choice((0, 20)),
        lease_ms=rng.choice((400, 2_000)),
        claim_ms=500,
        claim_hold_ms=1_000,
        link_connect_ms=600,
        link_reply_ms=800,
        push_bytes_max=rng.choice((1, 1 << 20)),
        kept_ms=3_000,
    )


def _router(rng: Random) -> RouterConfig:
    return RouterConfig(
        model_path=_NOWHERE,
        model_name="simulated",
        cluster_key=_KEY,
        control_socket=_NOWHERE,
        queue_max=rng.choice((3, 64)),
        queue_wait_ms=rng.choice((1_000, 6_000)),
        queue_patience_ms=300,
        queue_hold_ms=500,
        queue_hold_pause_ms=200,
        reserve_ms=700,
        attempts_max=rng.choice((3, 6)),
        strikes_max=rng.choice((2, 5)),
        resume_ms=700,
        shun_ms=100,
        shun_max_ms=800,
        prefill_backlog_tokens=rng.choice((16, 4096)),
        local_prefill=rng.choice(("auto", "never", "never")),
    )


def _targets(rng: Random) -> tuple[float, float]:
    """For first tokens and for answers, in ms; 0: none. Some that nobody can meet."""
    return rng.choice((0.0, 0.0, 5.0, 100.0)), rng.choice((0.0, 0.0, 1.0, 6.0, 20.0))


def _arrivals(rng: Random, shape: Shape) -> tuple[Arrival, ...]:
    count = rng.choice((6, 12, 20, 30))
    tokens_max = 4 * min(shape.decode_blocks)
    shared = [rng.randrange(1, VOCAB) for _ in range(24)]
    at_s, arrivals = 0.0, []
    gap_s = rng.choice((0.005, 0.05, 0.15))
    for number in range(count):
        at_s += rng.expovariate(1 / gap_s)
        ask = _ask(rng, number, shared, tokens_max)
        cancel_after = rng.randrange(ask.max_tokens + 1) if rng.random() < 0.1 else None
        cancel_s = rng.uniform(0, 0.1) if rng.random() < 0.15 else None
        arrivals.append(Arrival(at_s, ask, cancel_after, cancel_s))
    return tuple(arrivals)


def _ask(rng: Random, number: int, shared: list[int], tokens_max: int) -> Ask:
    begun = shared[: rng.choice((0, 0, 4, 8, 9, 16, 24))]
    own = [rng.randrange(1, VOCAB) for _ in range(rng.choice((1, 2, 3, 4, 8, 15)))]
    prompt = (begun + own if rng.random() < 0.9 else begun or own)[: tokens_max // 2]
    max_tokens = min(rng.choice((1, 2, 6, 12, 20)), tokens_max - len(prompt))
    return Ask(
        request_id=f"r{number}",
        prompt=tuple(prompt),
        seed=rng.choice((0, rng.randrange(1, 1 << 64))),
        max_tokens=max_tokens,
        ignore_eos=rng.random() < 0.3,
        penalties=rng.random() < 0.15,
        min_tokens=rng.choice((0, 0, 0, max_tokens // 2)),
        tenant=rng.choice(("a", "a", "a", "b")),
        priority=rng.choice((0, 0, 0, 5)),
        ttft_deadline_ms=rng.choice((0, 0, 0, 0, 0, 300)),
    )
