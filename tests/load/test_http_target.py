"""Servers with OpenAI's API that take this and lack that, and those that are none."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificates
from openai_double import OpenAIDouble, openai_double
from ports import silent_address
from waiting import until

from cluster.load.http_target import HttpTarget
from cluster.load.pacing import Pacing
from cluster.load.plan import LoadError, Target
from cluster.load.result import LoadResult
from cluster.workload.asks import Ask, Workload
from cluster.workload.slo import Slo

SLO = Slo(60_000, 60_000)
BLOCK_TOKENS = 16
ASKS = (Ask(0.0, 40, 6, (1, 2)), Ask(0.01, 40, 6, (1, 3)), Ask(0.02, 5, 3))


async def run(
    double: OpenAIDouble, asks: tuple[Ask, ...] = ASKS, timeout_s: float = 30, **target: Any
) -> LoadResult:
    """As the driver does, in this process."""
    asked = Target(**{"url": double.address, **target})
    opened = await HttpTarget.open(asked, 0, BLOCK_TOKENS)
    pacing = Pacing(opened, Workload("test", asks, BLOCK_TOKENS), 64, timeout_s)
    pacing.prepare()
    pacing.begin()
    await until(lambda: pacing.is_done, within_s=30)
    pacing.check()
    await pacing.stop()
    outcomes = sorted(pacing.outcomes, key=lambda outcome: outcome.ask.at_s)
    return LoadResult(asked.url, "test", 0, opened.server, outcomes, told=pacing.told)


async def test_all_that_a_server_tells_is_measured() -> None:
    async with openai_double(cached_tokens=16, tokens_a_message=2, pause_s=0.002) as double:
        result = await run(double)
    asked = double.asked[-len(ASKS) :]
    assert {each["max_tokens"] for each in asked} == {6, 3}
    assert all(each["ignore_eos"] and each["model"] == "double" for each in asked)
    by_length = sorted((each["prompt"] for each in asked), key=len)
    assert [len(prompt) for prompt in by_length] == [5, 40, 40]
    assert by_length[1][:16] == by_length[2][:16]
    assert by_length[1][16:] != by_length[2][16:]
    found = result.figures(SLO)
    assert (found.requests, found.failed, found.short, found.attainment) == (3, 0, 0, 1.0)
    assert [outcome.tokens for outcome in result.outcomes] == [6, 6, 3]
    assert found.itl_ms.count == 4 + 4 + 1  # those of the first message have none
    assert found.cached_share == pytest.approx(48 / 85)
    assert result.server.notes == ()
    assert result.server.tokens_max == 4096


@pytest.mark.parametrize(
    ("lacks", "prompts", "noted"),
    [
        ({"takes_ids": False}, "text", "takes no token ids"),
        ({"vocab_size": 300}, "token ids", ""),
        ({"takes_ignore_eos": False, "usage": "end"}, "token ids", "takes no ignore_eos"),
        ({"usage": "end"}, "token ids", "counts tokens at the end only"),
        ({"usage": "passed over"}, "token ids", "counts tokens at the end only"),
        ({"usage": "never", "takes_ignore_eos": False}, "token ids", "does not count tokens"),
    ],
)
async def test_what_a_server_lacks_is_left_out_and_said(
    lacks: dict[str, Any], prompts: str, noted: str
) -> None:
    async with openai_double(**lacks) as double:
        result = await run(double)
    assert result.server.prompts == prompts
    assert noted in " ".join(result.server.notes)
    assert [outcome.tokens for outcome in result.outcomes] == [6, 6, 3]
    if prompts == "text":
        assert {len(each["prompt"].split()) for each in double.asked[-3:]} == {40, 5}


@pytest.mark.parametrize("usage", ["end", "passed over"])
async def test_tokens_are_the_servers_count_even_where_messages_have_several(usage: str) -> None:
    """And what comes after the last message is no token."""
    async with openai_double(usage=usage, tokens_a_message=3) as double:
        result = await run(double)
    assert [outcome.tokens for outcome in result.outcomes] == [6, 6, 3]
    assert [len(outcome.gaps_s) for outcome in result.outcomes] == [1, 1, 0]


@pytest.mark.parametrize(
    ("wrong", "kind", "told"),
    [
        ({"status": 503}, "HTTP 503", "not today"),
        ({"breaks_after": 2, "pause_s": 0.001}, "connection lost", ""),
    ],
)
async def test_failures_are_counted_by_kind(wrong: dict[str, Any], kind: str, told: str) -> None:
    async with openai_double(**wrong) as double:
        result = await run(double)
    found = result.figures(SLO)
    assert found.errors == {kind: 3}
    assert found.attainment == found.goodput_rps == 0
    assert told in result.told[kind]
    assert any(line.startswith(f"Failed with {kind}: 3 of 3.") for line in result.notes(found))


async def test_an_answer_that_takes_too_long_has_failed() -> None:
    async with openai_double(hold=asyncio.Event()) as double:
        result = await run(double, timeout_s=0.05)
        assert result.figures(SLO).errors == {"timeout": 3}
        double.hold.set()


async def test_a_stream_without_done_is_whole_when_its_answer_is() -> None:
    async with openai_double(ends_without_done=True) as double:
        assert (await run(double)).figures(SLO).failed == 0


async def test_an_api_key_over_tls(tmp_path: Path) -> None:
    folder = make_certificates(tmp_path / "certificates")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    async with openai_double(tls=context, api_key="sesame") as double:
        keyed = {"api_key": "sesame", "certificates": str(folder)}
        assert (await run(double, **keyed)).figures(SLO).failed == 0
        with pytest.raises(LoadError, match="asks for an --api-key: a key, please"):
            await run(double, certificates=str(folder))
        with pytest.raises(LoadError, match="refuses this --api-key"):
            await run(double, certificates=str(folder), api_key="abracadabra")
        with pytest.raises(LoadError, match="certificate verify failed"):
            await run(double)


@pytest.mark.parametrize("ending", ["/", "/v1", "/v1/", "/v1/completions"])
async def test_the_url_may_go_on(ending: str) -> None:
    async with openai_double() as double:
        assert (await run(double, url=double.address + ending)).figures(SLO).failed == 0


@pytest.mark.parametrize(
    ("ending", "complaint"), [("/app", "does not list its models"), (":x", "Port could not be")]
)
async def test_a_url_of_something_else(ending: str, complaint: str) -> None:
    async with openai_double() as double:
        with pytest.raises(LoadError, match=complaint):
            await run(double, url=double.address + ending)


async def test_no_server_and_no_such_model() -> None:
    async with openai_double(status=500, vocab_size=0, takes_ids=False) as double:
        with (
            silent_address() as address,
            pytest.raises(LoadError, match="no HTTP server answers at 127"),
        ):
            await run(double, url=f"http://{address}")
    async with openai_double() as double:
        double.takes_ignore_eos = double.takes_ids = False
        double._refusal = lambda asked: "there is no such model"  # type: ignore[method-assign]
        with pytest.raises(LoadError, match="takes no request of ours: there is no such model"):
            await run(double, model="other")
