"""What Pools does about deaths, with a double in the place of Ray: nothing is started."""

import os
import signal
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from cluster import pools
from cluster.options import ServeError
from kvrelay.config import WorkerConfig


class FakeRay:
    """`ended` are the references that are ready, and what `get` gives or raises for them."""

    def __init__(self) -> None:
        self.ended: dict[str, object] = {}
        self.waited_s: list[float] = []
        self.killed: list[FakeActor] = []

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
    def __init__(self, name: str) -> None:
        self.name = name

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
    made = {"prefill": 0, "decode": 0}

    def create(self, role: str) -> FakeActor:
        made[role] += 1
        return FakeActor(f"{role[0]}{made[role] - 1}")

    monkeypatch.setattr(pools.Pools, "_create", create)
    config = WorkerConfig(model_path=tmp_path, cluster_key="k" * 16, socket_dir=tmp_path)
    both = pools.Pools(config, {"prefill": 1, "decode": 1}, tmp_path)
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
