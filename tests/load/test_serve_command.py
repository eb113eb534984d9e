"""`kvrelay bench serve` as people run it, with its own process, against a double and a cluster."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from local_cluster import local_cluster
from openai_double import openai_double
from ports import silent_address
from tiny_models import make_tiny

from cluster.cli import main
from cluster.load.grpc_target import GrpcTarget
from cluster.load.http_target import HttpTarget
from cluster.load.plan import LoadError, Plan, Target
from cluster.load.run import run_load
from cluster.workload.mixes import make_mix
from cluster.workload.slo import Slo

COMMAND = [sys.executable, "-c", "from cluster.cli import main; main()", "bench", "serve"]
FEW = ("--rate", "50", "--requests", "12", "--prompt", "5:40", "--answer", "2:6")
WITHIN_S = 120


async def start(*options: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*COMMAND, *options, stdout=pipe, stderr=pipe)


async def ended(process: asyncio.subprocess.Process) -> tuple[str, str]:
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    return out.decode(), err.decode()


async def test_a_table_or_json_and_a_page(tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    async with openai_double(cached_tokens=1) as double:
        process = await start(double.address, *FEW, "--json", "--report", str(page))
        out, err = await ended(process)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["figures"]["requests"] == len(told["requests"]) == 12
    assert told["figures"]["failed"] == 0
    assert told["figures"]["slo"] == {"ttft_ms": 2000, "tpot_ms": 150}
    assert {"p50", "p90", "p99"} <= told["figures"]["itl_ms"].keys()
    assert told["figures"]["cached_share"] > 0
    html = page.read_text()
    assert html.count("<svg") == 1
    for word in ("TTFT", "SLO", "goodput", "tokens/s"):
        assert word in html
    # Nothing is fetched: what links there are name XML's own vocabularies.
    assert "src=" not in html
    assert "<link" not in html


async def test_ctrl_c_shows_what_was_measured() -> None:
    enough = asyncio.Event()

    def on_ask(number: int) -> None:
        if number == 20:
            enough.set()

    async with openai_double(on_ask=on_ask) as double:
        process = await start(double.address, "--rate", "20", "--requests", "2000", "--json")
        await asyncio.wait_for(enough.wait(), WITHIN_S)
        process.send_signal(signal.SIGINT)
        out, err = await ended(process)
    assert process.returncode == 130, err
    told = json.loads(out)
    assert told["stopped"] is True
    assert 1 <= told["figures"]["requests"] < 2000
    assert any(note.startswith("Stopped:") for note in told["notes"])


async def test_our_own_cluster_over_grpc(tmp_path: Path) -> None:
    """The phases are its own; the shared prefix is cached from the second request on."""
    model = make_tiny("llama", tmp_path / "tiny")
    workload = make_mix("shared-prefix", 20.0, None, requests=6)
    short = [
        # Of 4 blocks of 16 tokens, the first 3 are shared.
        ask.__class__(ask.at_s, 64, 5, (1, 2, 3), ask.kind)
        for ask in workload.asks
    ]
    shared = workload.__class__("shared", tuple(short), 16)
    async with local_cluster(model) as cluster:
        plan = Plan.of(Target(url=f"grpc://{cluster.router.address}"), shared)
        result = await asyncio.to_thread(run_load, plan)
    found = result.figures(Slo(1e6, 1e6))
    assert found.errors == {}
    assert (found.requests, found.short, found.attainment) == (6, 0, 1.0)
    assert result.server.prompts == "token ids"
    assert found.queue_ms.count == found.prefill_ms.count == found.hand_off_ms.count == 6
    assert 0 < found.cached_share < 1
    assert found.itl_ms.count == 6 * 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ttft-ms", "0"], "an SLO of 0 ms for TTFT: it must be above 0"),
        (["--rate", "0"], "must be above 0"),
        (["--trace", "no/such.csv"], "no/such.csv: No such file"),
        (["--trace", "x", "--mix", "chat"], "what is asked? --trace FILE or --mix chat|"),
        (["--trace", "x", "--arrivals", "constant"], "--arrivals goes with --mix alone: drop it"),
        (["--rate-scale", "2"], "--rate-scale goes with --trace alone"),
        (["--mix", "chat", "--prompt", "1:2"], "--prompt goes with --mix uniform alone"),
        (["--report", "load.pdf"], "its name has to end in .html"),
        (["--prompt", "9:1"], "prompts of 9 to 1 tokens"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["bench", "serve", "http://127.0.0.1:1", *options])
    assert result.exit_code == 1
    assert complaint in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_no_server() -> None:
    with (
        silent_address() as address,
        pytest.raises(LoadError, match="nothing answers at 127") as raised,
    ):
        run_load(Plan.of(Target(url=address), make_mix("uniform", 1.0, None, requests=1)))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://127.0.0.1", "not a server's address"),
        ("grpcs://127.0.0.1:1", "add --certificates"),
        ("127.0.0.1:1/v1", "not a server's address"),
        ("http://", "it is not of the form http"),
    ],
)
async def test_a_url_that_is_none(url: str, complaint: str) -> None:
    target = Target(url=url)
    kind = HttpTarget if target.is_http else GrpcTarget
    with pytest.raises(LoadError, match=complaint):
        await kind.open(target, 0, 16)


def test_a_range_is_two_numbers() -> None:
    arguments: list[Any] = ["bench", "serve", "http://127.0.0.1:1", "--prompt", "many"]
    result = CliRunner().invoke(main, arguments)
    assert "not of the form A:B" in result.output
