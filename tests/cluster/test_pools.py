"""What Pools does about deaths, with a double in the place of Ray: nothing is started."""

import os
import signal
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from cluster import pools
from cluster.cores import Slot
from cluster.options import ServeError
from kvrelay.config import WorkerConfig


class FakeRay:
    """`ended` are the references that are ready, and what `get` gives or raises for them."""

    def __init__(self) -> None:
        self.ended: dict[str, object] = {}
        self.waited_s: list[float] = []
        self.killed: list[FakeActor] = []
        self.made: dict[str, FakeActor] = {}

    def wait(self, refs, *, num_returns, timeout):
        self.waited_s.append(timeout)
        done = [ref for ref in refs if ref in self.ended][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref, *, timeout):
        value = self.ended.get(ref, GetTimeoutError())
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor):
        self.killed.append(actor)

    def shutdown(self):
        pass


class FakeActor:
    def __init__(self, name: str, config: WorkerConfig) -> None:
        self.name = name
        self.config = config

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: f"{self.name}.{method}")


@pytest.fixture
def ray(monkeypatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(pools, "ray", fake)
    monkeypatch.setattr(pools, "_RESTART_BACKOFF_S", (0.0,))
    return fake


@pytest.fixture
def started(ray, monkeypatch, tmp_path) -> pools.Pools:
    """A prefill worker p0 and a decode worker d0; those that follow are p1, d1, p2, ..."""

    def create(role: str, config_json: str) -> FakeActor:
        number = sum(name.startswith(role[0]) for name in ray.made)
        actor = FakeActor(f"{role[0]}{number}", WorkerConfig.model_validate_json(config_json))
        ray.made[actor.name] = actor
        return actor

    double = SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=create))
    monkeypatch.setattr(pools, "WorkerActor", double)
    config = WorkerConfig(model_path=tmp_path, cluster_key="k" * 16, socket_dir=tmp_path)
    both = pools.Pools(config, [Slot("prefill", (0, 1)), Slot("decode", (2, 3))], tmp_path)
    ray.ended.update({"p0.start": "here:0", "d0.start": "here:1"})
    assert list(both.start_workers()) == [0, 1, 2]
    return both


def test_a_replacement_that_loads_is_waited_for_beside_everything_else(ray, started, caplog):
    ray.ended["p0.wait_for_end"] = None
    assert started.replace_dead(0.5)
    assert started.addresses("prefill") == []
    assert [actor.name for actor in ray.killed] == ["p0"]
    assert "--verbose" in caplog.text

    assert not started.replace_dead(0.5), "p1 loads and nothing has changed"
    ray.ended["d0.wait_for_end"] = None
    assert started.replace_dead(0.5), "a death is noticed while p1 loads"
    assert started.addresses("decode") == []

    ray.ended["p1.start"] = "here:2"
    assert started.replace_dead(0.5)
    assert started.addresses("prefill") == ["here:2"]
    assert set(ray.waited_s) == {0.5}


@pytest.mark.parametrize("late", [False, True])
def test_a_replacement_that_does_not_start_is_replaced(ray, started, monkeypatch, caplog, late):
    ray.ended["p0.wait_for_end"] = None
    assert started.replace_dead(0.5)
    if late:
        monkeypatch.setattr(pools, "_START_S", 0.0)
    else:
        ray.ended["p1.start"] = RayActorError()
    assert not started.replace_dead(0.5)
    assert [actor.name for actor in ray.killed] == ["p0", "p1"]
    assert ("did not start within" if late else "died while starting") in caplog.text

    monkeypatch.setattr(pools, "_START_S", 600.0)
    ray.ended["p2.start"] = "here:2"
    assert started.replace_dead(0.5)
    assert started.addresses("prefill") == ["here:2"]


def test_a_replacement_gets_the_cores_of_the_one_it_replaces(ray, started):
    ray.ended["p0.wait_for_end"] = None
    started.replace_dead(0.5)
    ray.ended["d0.wait_for_end"] = None
    started.replace_dead(0.5)
    ray.ended["p1.start"] = RayActorError()
    started.replace_dead(0.5)
    started.replace_dead(0.5)
    cores = {name: actor.config.cores for name, actor in ray.made.items()}
    assert cores == {"p0": (0, 1), "d0": (2, 3), "p1": (0, 1), "d1": (2, 3), "p2": (0, 1)}


def test_workers_of_one_role_do_not_swap_cores(ray, started):
    started.slots = [Slot("decode", (4,)), Slot("decode", (5,))]
    ray.ended.update({"d1.start": "here:2", "d2.start": "here:3"})
    assert list(started.start_workers())[-1] == 2
    for died in ("d2", "d1"):
        ray.ended[f"{died}.wait_for_end"] = None
        started.replace_dead(0.5)
    started.replace_dead(0.5)
    cores = [actor.config.cores for name, actor in ray.made.items() if name.startswith("d")]
    assert cores[1:] == [(4,), (5,), (5,), (4,)]


def test_a_signal_waits_until_ray_has_started():
    arrived = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: arrived.append(number))
    try:
        with pools._signals_deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert arrived == []
        assert arrived == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_start_fails_at_once(ray, started):
    ray.ended["p1.start"] = RayActorError()
    with pytest.raises(ServeError, match="prefill worker died while starting"):
        list(started.start_workers())


def test_those_that_are_starting_are_ended_at_the_stop(ray, started):
    ray.ended["p0.wait_for_end"] = None
    started.replace_dead(0.5)
    started.replace_dead(0.5)
    started.stop()
    assert [actor.name for actor in ray.killed] == ["p0", "p1"]
