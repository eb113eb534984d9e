"""`kvrelay bench prefix`: what it asks, what it makes of the answers; slowly, the whole command."""

import json
from collections import Counter
from typing import Any

import pytest
from click.testing import CliRunner
from local_cluster import local_cluster
from tiny_models import make_endless

from cluster.bench import prefix, random_router
from cluster.bench.prefix import PrefixBench
from cluster.bench.report import BenchError
from cluster.cli import main
from router import choosing, policy
from router.policy import Wish
from router.prediction import DecodeView, PrefillView

ASKED = PrefixBench(requests=12, clients=2, system_tokens=100, prefill=1, decode=1, quantize="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_endless(tmp_path_factory.mktemp("llama"))


def silent(what: str, share: float | None) -> None:
    """Nobody looks at the progress."""


async def test_every_cluster_gets_the_same_requests_and_caching_saves_most(model):
    shares = []
    for caching in (True, False):
        async with local_cluster(model, worker={"prefix_caching": caching}) as cluster:
            answers = await prefix._load(cluster.router.address, ASKED, "", silent)
        shares.append(prefix._recomputed(answers, ASKED, block_size=16))
        assert len(answers) == 12
        assert {answer.prompt_tokens for answer in answers} == {ASKED.prompt_tokens}
        assert all(answer.timings.ttft_ms > 0 for answer in answers)
    assert shares[0] < 0.5  # both clients begin at once, and each worker has its own cache
    assert shares[1] == 1.0


async def test_a_model_that_is_too_short_is_refused(model):
    asked = PrefixBench(2, 1, 5000, 1, 1, "none")
    async with local_cluster(model) as cluster:
        with pytest.raises(BenchError, match="fewer than 5000 with --system-tokens"):
            await prefix._load(cluster.router.address, asked, "", silent)


def test_a_prompt_without_a_block_is_refused():
    result = CliRunner().invoke(main, ["bench", "prefix", "--system-tokens", "15"])
    assert result.exit_code == 2
    assert "--system-tokens" in result.output


# ---- placement at random


def prefill_view(name: str, **more: Any) -> PrefillView:
    return PrefillView(name, **{"queued_tokens": 0, "blocks_total": 100, "block_size": 16, **more})


def decode_view(name: str, **more: Any) -> DecodeView:
    own = {"blocks_free": 100, "sequences": 0, "block_size": 16}
    return DecodeView(name, **{**own, **more})


WISH = Wish(prompt_tokens=160, max_tokens=8, backlog_tokens_max=200)


def pairs_chosen(prefill: list[PrefillView], decode: list[DecodeView]) -> Counter[Any]:
    choices = [random_router.place_at_random(prefill, decode, WISH) for _ in range(400)]
    return Counter(choice and (choice.placement.pair, choice.now) for choice in choices)


def test_every_pair_with_room_is_as_likely_whatever_it_caches_and_however_busy():
    prefill = [prefill_view("p1", cached_blocks=9), prefill_view("p2")]
    decode = [decode_view("d1", cached_blocks=9), decode_view("d2", sequences=9)]
    chosen = pairs_chosen(prefill, decode)
    assert set(chosen) == {((p, d), True) for p in ("p1", "p2") for d in ("d1", "d2")}
    assert min(chosen.values()) > 60  # of 100 expected


def test_who_has_no_room_is_not_chosen():
    full, busy = decode_view("d1", blocks_free=5), prefill_view("p1", queued_tokens=100)
    chosen = pairs_chosen([busy, prefill_view("p2")], [full, decode_view("d2")])
    assert set(chosen) == {(("p2", "d2"), True)}
    assert set(pairs_chosen([busy], [decode_view("d2")])) == {(("p1", "d2"), False)}
    assert set(pairs_chosen([busy], [full])) == {None}


def test_placement_is_where_the_bench_replaces_it(monkeypatch):
    monkeypatch.setattr(choosing, "place", policy.place)  # put back afterwards
    random_router.inject()
    assert choosing.place is random_router.place_at_random


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    model = make_endless(tmp_path / "llama")
    arguments = ["bench", "prefix", str(model), "--quick", "--prefill", "1", "--decode", "1"]
    result = CliRunner().invoke(main, [*arguments, "--system-tokens", "512", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["prefix/recomputed"]["value"] < rows["prefix/recomputed"]["baseline"] == 100
    assert rows["prefix/ttft-mean"]["ratio"] > 0
