"""`kvrelay bench prefix`: what it asks, what it makes of the answers; slowly, the whole command."""

import json

import pytest
from click.testing import CliRunner
from local_cluster import local_cluster
from tiny_models import make_endless

from cluster.bench import prefix
from cluster.bench.prefix import PrefixBench
from cluster.bench.report import BenchError
from cluster.cli import main

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
    assert shares[0] <= 1 / 11  # the two clients begin at once
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


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    model = make_endless(tmp_path / "llama")
    arguments = ["bench", "prefix", str(model), "--quick", "--prefill", "1", "--decode", "1"]
    result = CliRunner().invoke(main, [*arguments, "--system-tokens", "512", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["prefix/recomputed"]["value"] < rows["prefix/recomputed"]["baseline"] == 100
    assert rows["prefix/ttft-mean"]["ratio"] > 0
