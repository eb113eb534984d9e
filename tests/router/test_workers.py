"""What the router knows of its workers; their order is in test_shortlist.py."""

from pathlib import Path
from typing import Any

import pytest

from kvrelay.config import RouterConfig
from kvrelay.kv.prefix import PrefixChain, chain_root, join_hashes
from kvrelay.wire import transfer_pb2
from kvrelay.wire import worker_pb2 as pb
from router.admission import Sampling
from router.policy import Placement
from router.prediction import NEUTRAL_BLOCK_MS
from router.request import Request, Times
from router.shortlist import Shortlist
from router.workers import Workers


def workers_of(*names: str, **config: Any) -> Workers:
    workers = Workers(
        RouterConfig(
            model_path=Path("none"),
            model_name="tiny",
            cluster_key="k" * 16,
            control_socket=Path("none"),
            **config,
        )
    )
    for name in names:
        layout = transfer_pb2.KvLayout(model_fingerprint="m", block_size=4)
        info = pb.WorkerInfo(layout=layout, blocks_total=1000, max_model_tokens=4000)
        (workers.prefill_up if name[0] == "p" else workers.decode_up)(name, info)
    return workers


def request(prompt: int = 400, max_tokens: int = 10) -> Request:
    sampling = Sampling(0.0, 0, 1.0, 0, max_tokens, (), ())
    return Request("r", list(range(prompt)), sampling, Times(0.0))


def tell_blocks(workers: Workers, worker: str, prompt_tokens: int) -> None:
    chain = PrefixChain(chain_root("m", 4, ""), 4)
    chain.extend(range(prompt_tokens))
    added = join_hashes(chain.hashes)
    assert workers.blocks_changed(worker, pb.BlockChanges(number=1, everything=True, added=added))


def pair(workers: Workers, request: Request) -> tuple[str | None, str]:
    choice = workers.choosing.choose(request)
    assert choice is not None
    return choice.placement.pair


def test_a_prompt_goes_where_its_prefix_is_cached():
    workers = workers_of("p1", "p2", "d1", "d2")
    assert pair(workers, request()) == ("p1", "d1")
    tell_blocks(workers, "p2", 300)
    assert pair(workers, request()) == ("p2", "d1")
    tell_blocks(workers, "d2", 400)
    assert pair(workers, request()) == (None, "d2")
    assert workers.choosing.choose(request()).placement.tokens == 4


def test_another_tenants_prefix_is_not_found():
    workers = workers_of("p1", "p2", "d1")
    tell_blocks(workers, "p2", 300)
    other = request()
    other.tenant = "other"
    assert pair(workers, other) == ("p1", "d1")


def test_a_worker_that_is_gone_and_back_caches_nothing():
    workers = workers_of("p1", "p2", "d1")
    tell_blocks(workers, "p2", 300)
    workers.down("p2")
    assert pair(workers, request()) == ("p1", "d1")
    info = pb.WorkerInfo(
        layout=transfer_pb2.KvLayout(model_fingerprint="m", block_size=4), blocks_total=1000
    )
    workers.prefill_up("p2", info)
    assert workers.choosing.choose(request()).placement.tokens == 400


def test_hand_offs_that_were_slow_count():
    workers = workers_of("p1", "p2", "d1")
    placement = Placement("p1", "d1", 0, 0, 400)
    for key in range(1, 20):
        workers.claim(key, placement, 400, 10)
        workers.claims.reserved(key, cached_blocks=60)  # 40 are moved
        workers.claims.handed_off(key, exposed_ms=200)
        workers.claims.release(key)
    assert workers.prefill["p1"].hand_offs.block_ms == pytest.approx(5, rel=0.1)
    assert workers.prefill["p2"].hand_offs.block_ms == NEUTRAL_BLOCK_MS
    assert pair(workers, request()) == ("p2", "d1")


def test_a_hand_off_of_no_blocks_says_nothing_of_their_cost():
    workers = workers_of("p1", "d1")
    workers.claim(1, Placement("p1", "d1", 0, 0, 4), 400, 10)
    workers.claims.reserved(1, cached_blocks=100)
    workers.claims.handed_off(1, exposed_ms=200)
    assert workers.prefill["p1"].hand_offs.block_ms == NEUTRAL_BLOCK_MS


def test_nothing_is_chosen_where_no_decode_worker_has_room():
    workers = workers_of("p1", "d1")
    workers.decode_load("d1", pb.DecodeLoad(blocks_free=101), refused=False)
    assert workers.choosing.choose(request(400, 10)) is None
    workers.decode_load("d1", pb.DecodeLoad(blocks_free=103), refused=False)
    assert workers.choosing.choose(request(400, 10)) is not None


def test_room_is_found_however_many_less_busy_workers_have_none():
    workers = workers_of("p1", *(f"d{n}" for n in range(20)))
    for n in range(20):
        load = pb.DecodeLoad(blocks_free=500 if n == 19 else 50, running=n)
        workers.decode_load(f"d{n}", load, refused=False)
    assert pair(workers, request()) == ("p1", "d19")


def test_a_worker_that_keeps_failing_comes_last_for_longer_each_time():
    workers = workers_of("p1", "d1", "d2", shun_ms=100, shun_max_ms=300)
    now = 0.0
    for shun_ms in (100, 200, 300, 300):
        workers.failed("d1", now)
        workers.failed("d1", now + 50)  # it had begun before, and makes it no longer
        workers.forgive(now + shun_ms - 1)
        assert pair(workers, request()) == ("p1", "d2")
        now += shun_ms
        workers.looked_at()
        workers.forgive(now)
        assert workers.room_grew, "somebody may wait for it"
        assert pair(workers, request()) == ("p1", "d1")
    workers.failed("d1", now)
    workers.succeeded("d1")
    assert pair(workers, request()) == ("p1", "d1")
    workers.failed("d1", now)
    assert workers.decode["d1"].shun_ms == 100


def test_a_worker_that_fails_is_better_than_none():
    workers = workers_of("p1", "d1")
    workers.failed("p1", 0)
    workers.failed("d1", 0)
    workers.failed("gone", 0)
    assert workers.choosing.choose(request()) is not None
    workers.down("d1")
    workers.forgive(1e9)
    assert workers.choosing.choose(request()) is None


@pytest.mark.parametrize(("local", "where"), [("auto", None), ("never", "p1")])
def test_prompts_are_kept_from_decode_workers_on_demand(local, where):
    workers = workers_of("p1", "d1", local_prefill=local)
    assert pair(workers, request(prompt=2)) == (where, "d1")
    workers.down("p1")
    assert pair(workers, request(prompt=2)) == (None, "d1")


def test_a_new_worker_is_taken_for_as_fast_as_the_others():
    workers = workers_of("p1", "d1", local_prefill="never")
    for base_ms, token_ms in ((0.5, 0.001), (50.0, 20.0)):  # far faster and slower than neutral
        cost = pb.StepCost(base_ms=base_ms, ms_per_prompt_token=token_ms)
        load = pb.PrefillLoad(queued_tokens=50, cost=cost)
        workers.prefill_load("p1", load, refused=False)
        info = pb.WorkerInfo(
            layout=transfer_pb2.KvLayout(model_fingerprint="m", block_size=4), blocks_total=1000
        )
        workers.prefill_up("p2", info)
        assert pair(workers, request()) == ("p2", "d1")
        idle = pb.PrefillLoad(queued_tokens=60, cost=pb.StepCost())
        workers.prefill_load("p2", idle, refused=False)
        assert pair(workers, request()) == ("p1", "d1")


def test_a_decode_worker_that_has_computed_no_prompt_is_no_faster_than_the_prefill_workers():
    workers = workers_of("p1", "d1")
    cost = pb.StepCost(base_ms=50, ms_per_prompt_token=20)
    workers.prefill_load("p1", pb.PrefillLoad(cost=cost), refused=False)
    cost = pb.StepCost(base_ms=50, ms_per_sequence=0.1)
    workers.decode_load("d1", pb.DecodeLoad(blocks_free=1000, cost=cost), refused=False)
    assert pair(workers, request()) == ("p1", "d1")


def test_prompts_are_counted_with_their_tokens():
    workers = workers_of("p1", "d1")
    p1, d1 = workers.prefill["p1"], workers.decode["d1"]
    workers.claim(1, Placement("p1", "d1", 0, 0, 40), 40, 10)
    workers.claim(2, Placement("p1", "d1", 0, 0, 8), 8, 10)
    workers.claim(3, Placement(None, "d1", 0, 0, 8), 8, 10)
    assert (p1.backlog_prompts, d1.backlog_prompts) == (2, 1)
    workers.claims.computed(1)
    workers.claims.release(3)
    assert (p1.backlog_prompts, d1.backlog_prompts) == (1, 0)
    workers.prefill_load("p1", pb.PrefillLoad(queued_tokens=9, queued_prompts=3), refused=False)
    load = pb.DecodeLoad(blocks_free=9, queued_tokens=9, queued_prompts=2)
    workers.decode_load("d1", load, refused=False)
    assert (p1.backlog_prompts, d1.backlog_prompts) == (3, 2)
    for key in (1, 2):
        workers.claims.computed(key)
        workers.claims.release(key)
    workers.check([])


@pytest.mark.parametrize(("told", "kept"), [(0, 256), (64, 64)])
def test_a_worker_says_how_long_its_chunks_are(told, kept):
    workers = workers_of()
    layout = transfer_pb2.KvLayout(model_fingerprint="m", block_size=4)
    info = pb.WorkerInfo(layout=layout, blocks_total=9, max_model_tokens=9, chunk_tokens=told)
    workers.prefill_up("p1", info)
    workers.decode_up("d1", info)
    assert workers.prefill["p1"].view(0).chunk_tokens == kept
    assert workers.decode["d1"].view(0).chunk_tokens == kept


def test_only_the_first_token_changes_who_is_busy(monkeypatch):
    workers = workers_of("p1", "d1")
    workers.claim(1, Placement("p1", "d1", 0, 0, 40), 40, 10)
    workers.claims.computed(1)

    def rank(*args: Any) -> bool:
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(Shortlist, "rank", rank)
    workers.claims.computed(1)


def told(workers: Workers, worker: str, base_ms: float, token_ms: float, **load: int) -> None:
    cost = pb.StepCost(base_ms=base_ms, ms_per_prompt_token=token_ms, ms_per_sequence=1)
    if worker[0] == "p":
        workers.prefill_load(worker, pb.PrefillLoad(cost=cost, **load), refused=False)
    else:
        message = pb.DecodeLoad(blocks_free=1000, cost=cost, **load)
        workers.decode_load(worker, message, refused=False)


def test_a_worker_with_one_bad_measurement_is_tried_again():
    workers = workers_of("p1", "p2", "d1", local_prefill="never")
    told(workers, "p1", 500, 20)
    told(workers, "p2", 5, 0.2, queued_tokens=100)
    assert pair(workers, request()) == ("p2", "d1")
    for second in range(10):
        workers.fade(second * 1000)
        told(workers, "p2", 5, 0.2, queued_tokens=100)
    assert workers.prefill["p1"].rates.prompt_token_ms == 20
    for second in range(10, 60):
        workers.fade(second * 1000)
        told(workers, "p1", 500, 20)  # as it says every second, without any work
        told(workers, "p2", 5, 0.2, queued_tokens=100)
    assert pair(workers, request()) == ("p1", "d1")
    workers.claim(1, Placement("p1", "d1", 0, 0, 400), 400, 10)
    told(workers, "p1", 400, 15)
    assert workers.prefill["p1"].rates.prompt_token_ms == 15, "it has measured again"
    workers.claims.release(1)


def test_a_decode_worker_whose_prompts_looked_slow_is_tried_again_though_it_decodes():
    workers = workers_of("p1", "d1")
    told(workers, "p1", 5, 0.2, queued_tokens=100)
    told(workers, "d1", 5, 50, running=3)
    assert pair(workers, request(prompt=8)) == ("p1", "d1")
    for second in range(60):
        workers.fade(second * 1000)
        told(workers, "p1", 5, 0.2, queued_tokens=100)
        told(workers, "d1", 6, 50 + second / 1000, running=3)
    assert workers.decode["d1"].rates.base_ms == 6
    assert pair(workers, request(prompt=8)) == (None, "d1")


def test_what_is_usual_is_not_the_newest():
    workers = workers_of("p1", "p2", "p3", "d1")
    for worker, token_ms in (("p1", 0.2), ("p2", 0.3), ("p3", 80)):
        told(workers, worker, 5, token_ms)
    layout = transfer_pb2.KvLayout(model_fingerprint="m", block_size=4)
    workers.prefill_up("p4", pb.WorkerInfo(layout=layout, blocks_total=1000))
    assert workers.prefill["p4"].rates.prompt_token_ms == 0.3


def test_one_slow_hand_off_sends_nobody_elsewhere():
    workers = workers_of("p1", "d1")
    workers.claim(1, Placement("p1", "d1", 0, 0, 200), 200, 10)
    workers.claims.handed_off(1, exposed_ms=2000)
    workers.claims.release(1)
    assert pair(workers, request(prompt=1500)) == ("p1", "d1")
