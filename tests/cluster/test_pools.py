"""What Pools does about deaths, hangs and restarts, with doubles in the place of Ray: nothing is
started."""

from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from cluster import place, pools, ray_worker
from cluster.cores import Slot
from cluster.options import ServeError
from kvrelay.config import WorkerConfig


class FakeRay:
    """`ended` are the references that are ready, and what `get` gives or raises for them."""

    def __init__(self) -> None:
        self.ended: dict[str, object] = {}
        self.waited_s: set[float] = set()
        self.killed: list[FakeActor] = []
        self.made: dict[str, FakeActor] = {}

    def wait(self, refs, *, num_returns, timeout):
        self.waited_s.add(timeout)
        done = [ref for ref in refs if ref in self.ended][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref, *, timeout):
        value = self.ended.get(ref, GetTimeoutError())
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor):
        self.killed.append(actor)

    @property
    def killed_names(self) -> list[str]:
        return [actor.name for actor in self.killed]


class FakeActor:
    def __init__(self, name: str, config: WorkerConfig) -> None:
        self.name = name
        self.config = config
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> SimpleNamespace:
        def remote(*args: object) -> str:
            self.asked.append(method)
            return f"{self.name}.{method}"

        return SimpleNamespace(remote=remote)


class FakeHead:
    def __init__(self, folder) -> None:
        pass

    def keep(self) -> None:
        pass

    def stop(self) -> None:
        pass


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    fake = FakeClock()
    for module in (pools, ray_worker):
        monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.fixture
def ray(monkeypatch, clock) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_worker, "ray", fake)
    monkeypatch.setattr(pools, "RayHead", FakeHead)

    def create(role: str, config_json: str) -> FakeActor:
        number = sum(name.startswith(role[0]) for name in fake.made)
        actor = FakeActor(f"{role[0]}{number}", WorkerConfig.model_validate_json(config_json))
        fake.made[actor.name] = actor
        return actor

    double = SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=create))
    monkeypatch.setattr(ray_worker, "WorkerActor", double)
    return fake


@pytest.fixture
def killed_pids(monkeypatch) -> list[int]:
    pids: list[int] = []
    double = SimpleNamespace(
        Process=lambda pid: SimpleNamespace(kill=lambda: pids.append(pid)),
        NoSuchProcess=ProcessLookupError,
    )
    monkeypatch.setattr(ray_worker, "psutil", double)
    return pids


def pools_of(ray: FakeRay, tmp_path, *slots: Slot) -> pools.Pools:
    """The workers of the slots have started; those of each role are p0, p1, ..., d0, d1, ..."""
    config = WorkerConfig(model_path=tmp_path, cluster_key="k" * 16, socket_dir=tmp_path)
    both = pools.Pools(config, list(slots), tmp_path)
    counts = {"p": 0, "d": 0}
    for slot in slots:
        name = slot.role[0]
        ray.ended.setdefault(f"{name}{counts[name]}.start", f"{name}{counts[name]}")
        counts[name] += 1
    assert list(both.start_workers())[-1] == len(slots)
    return both


@pytest.fixture
def started(ray, tmp_path) -> pools.Pools:
    """A prefill worker p0 and a decode worker d0; those that follow are p1, d1, p2, ..."""
    return pools_of(ray, tmp_path, Slot("prefill", (0, 1)), Slot("decode", (2, 3)))


def both(started: pools.Pools) -> list[str]:
    return started.addresses("prefill") + started.addresses("decode")


# ---- deaths


def test_a_replacement_that_loads_is_waited_for_beside_everything_else(ray, started, caplog):
    ray.ended["p0.wait_for_end"] = None
    started.keep(0.5)
    assert both(started) == ["d0"]
    assert ray.killed_names == ["p0"]
    assert "--verbose" in caplog.text

    started.keep(0.5)
    assert both(started) == ["d0"], "p1 loads and nothing has changed"
    ray.ended["d0.wait_for_end"] = None
    started.keep(0.5)
    assert both(started) == [], "a death is noticed while p1 loads"

    ray.ended["p1.start"] = "p1"
    started.keep(0.5)
    assert both(started) == ["p1"]
    assert ray.waited_s <= {0, 0.5}


@pytest.mark.parametrize("late", [False, True])
def test_a_replacement_that_does_not_start_is_replaced(ray, started, clock, caplog, late):
    ray.ended["p0.wait_for_end"] = None
    started.keep(0.5)
    started.keep(0.5)
    if late:
        clock.now_s += ray_worker.START_S
    else:
        ray.ended["p1.start"] = RayActorError()
    started.keep(0.5)
    assert ray.killed_names == ["p0", "p1"]
    assert ("did not start within" if late else "died while starting") in caplog.text

    clock.now_s += place.RESTART_BACKOFF_S[1]
    ray.ended["p2.start"] = "p2"
    started.keep(0.5)
    assert started.addresses("prefill") == ["p2"]


def test_a_place_where_nothing_lives_makes_no_other_wait(ray, clock, tmp_path):
    three = pools_of(ray, tmp_path, *[Slot("decode")] * 3)  # equal slots
    for failed in range(len(place.RESTART_BACKOFF_S)):
        number = 0 if failed == 0 else failed + 2
        ray.ended[f"d{number}.wait_for_end"] = None
        ray.ended[f"d{number + 1 if failed else 3}.start"] = "new"
        three.keep(0.5)
        clock.now_s += place.RESTART_BACKOFF_S[failed]
        three.keep(0.5)
    assert len(three.addresses("decode")) == 3
    made = len(ray.made)
    ray.ended["d1.wait_for_end"] = None
    three.keep(0.5)
    three.keep(0.5)
    assert len(ray.made) == made + 1, "the first death in a place waits for nothing"


def test_a_replacement_gets_the_cores_of_the_one_it_replaces(ray, started, clock):
    ray.ended["p0.wait_for_end"] = None
    started.keep(0.5)
    ray.ended["d0.wait_for_end"] = None
    started.keep(0.5)
    ray.ended["p1.start"] = RayActorError()
    started.keep(0.5)
    clock.now_s += place.RESTART_BACKOFF_S[1]
    started.keep(0.5)
    cores = {name: actor.config.cores for name, actor in ray.made.items()}
    assert cores == {"p0": (0, 1), "d0": (2, 3), "p1": (0, 1), "d1": (2, 3), "p2": (0, 1)}


def test_workers_of_one_role_do_not_swap_cores(ray, tmp_path):
    two = pools_of(ray, tmp_path, Slot("decode", (4,)), Slot("decode", (5,)))
    for died in ("d1", "d0"):
        ray.ended[f"{died}.wait_for_end"] = None
        two.keep(0.5)
    two.keep(0.5)
    cores = [actor.config.cores for actor in ray.made.values()]
    assert cores == [(4,), (5,), (5,), (4,)]


def test_the_first_start_fails_at_once(ray, tmp_path):
    ray.ended["d0.start"] = RayActorError()
    with pytest.raises(ServeError, match="decode worker died while starting"):
        pools_of(ray, tmp_path, Slot("prefill"), Slot("decode"))


def test_those_that_are_starting_are_ended_at_the_stop(ray, started):
    ray.ended["p0.wait_for_end"] = None
    started.keep(0.5)
    started.keep(0.5)
    started.stop()
    assert ray.killed_names == ["p0", "p1"]
    assert "stop" in ray.made["d0"].asked


# ---- silence


def keep_for(started: pools.Pools, clock: FakeClock, duration_s: float) -> None:
    """As the watch loop does."""
    for _ in range(int(duration_s)):
        clock.now_s += 1.0
        started.keep(0.5)


def test_a_worker_that_gives_no_sign_of_life_is_killed_and_replaced(
    ray, started, clock, killed_pids, caplog
):
    ray.ended |= {"p0.alive": 70, "d0.alive": 71}
    keep_for(started, clock, 60)
    assert both(started) == ["p0", "d0"]
    del ray.ended["d0.alive"]
    keep_for(started, clock, ray_worker.HANG_S)
    assert both(started) == ["p0", "d0"], "not yet"
    keep_for(started, clock, 1)
    assert both(started) == ["p0"]
    assert (ray.killed_names, killed_pids) == (["d0"], [71])
    assert "a decode worker gave no sign of life for 10 s" in caplog.text
    ray.ended["d1.start"] = "d1"
    started.keep(0.5)
    assert both(started) == ["p0", "d1"]


def test_a_worker_that_comes_back_in_time_goes_on(ray, started, clock, killed_pids):
    for _ in range(3):
        ray.ended |= {"p0.alive": 70, "d0.alive": 71}
        keep_for(started, clock, 1)
        del ray.ended["p0.alive"], ray.ended["d0.alive"]
        keep_for(started, clock, ray_worker.HANG_S)
    assert both(started) == ["p0", "d0"]
    assert killed_pids == []


def test_nobody_is_blamed_when_the_watching_process_was_held_up(ray, started, clock):
    ray.ended |= {"p0.alive": 70, "d0.alive": 71}
    keep_for(started, clock, 1)
    del ray.ended["p0.alive"], ray.ended["d0.alive"]
    clock.now_s += 3600
    started.keep(0.5)
    assert both(started) == ["p0", "d0"]


def test_a_start_that_hangs_is_given_more_time_and_then_up(
    ray, started, clock, killed_pids, caplog
):
    ray.ended |= {"d0.alive": 71, "p0.wait_for_end": None}
    started.keep(0.5)
    keep_for(started, clock, ray_worker.HANG_STARTING_S)
    assert ray.killed_names == ["p0"]
    keep_for(started, clock, 2)
    assert ray.killed_names == ["p0", "p1"]
    assert "prefill worker gave no sign of life for 120 s while starting" in caplog.text


# ---- restarts


def test_workers_are_restarted_one_after_another(ray, started, caplog):
    started.restart()
    started.keep(0.5)
    assert both(started) == ["p0", "d0"], "it finishes what it has"
    assert "drain" in ray.made["p0"].asked
    ray.ended["p0.drain"] = True
    started.keep(0.5)
    assert both(started) == ["d0"]
    started.keep(0.5)
    assert "stop" not in ray.made["p0"].asked, "a router may still need it"
    started.routers_know()
    assert "stop" in ray.made["p0"].asked
    ray.ended |= {"p0.stop": None, "p0.wait_for_end": RayActorError()}
    started.keep(0.5)
    assert ray.killed_names == ["p0"]
    started.keep(0.5)
    assert "drain" not in ray.made["d0"].asked, "one at a time"
    ray.ended["p1.start"] = "p1"
    started.keep(0.5)
    assert both(started) == ["p1", "d0"]

    ray.ended |= {"d0.drain": False, "d0.stop": None, "d1.start": "d1"}
    for _ in range(4):
        started.keep(0.5)
        started.routers_know()
    assert both(started) == ["p1", "d1"]
    assert "died" not in caplog.text
    assert caplog.messages[-1] == "all workers have been restarted"
    started.keep(0.5)
    assert set(ray.made) == {"p0", "d0", "p1", "d1"}


def test_a_worker_that_never_says_that_it_is_idle_is_restarted_all_the_same(ray, started, clock):
    started.restart()
    started.keep(0.5)
    clock.now_s += 40
    started.keep(0.5)
    assert both(started) == ["d0"]
    started.routers_know()
    started.keep(0.5)
    clock.now_s += 6
    started.keep(0.5)
    assert ray.killed_names == ["p0"], "it does not stop, either"


def test_a_worker_that_dies_while_it_drains_is_replaced_and_the_next_one_follows(ray, started):
    started.restart()
    started.keep(0.5)
    ray.ended |= {"p0.drain": RayActorError(), "p0.wait_for_end": RayActorError()}
    started.keep(0.5)
    assert both(started) == ["d0"]
    ray.ended["p1.start"] = "p1"
    started.keep(0.5)
    assert both(started) == ["p1", "d0"]
    assert "drain" in ray.made["d0"].asked


def test_one_that_was_replaced_meanwhile_is_not_restarted_again(ray, started):
    started.restart()
    ray.ended |= {"d0.wait_for_end": RayActorError(), "p0.drain": True, "p0.stop": None}
    ray.ended |= {"d1.start": "d1", "p1.start": "p1"}
    for _ in range(8):
        started.keep(0.5)
        started.routers_know()
    assert both(started) == ["p1", "d1"]
    assert set(ray.made) == {"p0", "d0", "p1", "d1"}
