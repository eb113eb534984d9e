"""`kvrelay chaos` as people run it, shortly: a few faults, all answers right, nothing left."""

import asyncio
import json
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner
from ports import silent_address

from cluster.chaos import commands
from cluster.chaos.http_stream import (
    AnswerFailedError,
    Piece,
    RefusedError,
    RouterLostError,
    pieces,
)
from cluster.chaos.model import TINY
from cluster.chaos.run import Chaos
from cluster.cli import main

WITHIN_S = 240
SEED = "26"  # a short stop comes first, then a kill: both fit, however long a restart takes


def run_chaos(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "chaos", "--json"]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=WITHIN_S, check=False
    )


def test_a_few_faults_lose_nothing(tmp_path):
    page = tmp_path / "chaos.html"
    kinds = ("kill-decode", "kill-router", "stop-decode")
    faults = (word for kind in kinds for word in ("--fault", kind))
    few = ("--minutes", "0.2", "--kill-every", "3", "--prefill", "1", "--seed", SEED)
    ended = run_chaos(*few, *faults, "--transport", "tcp", "--report", str(page))
    assert ended.stdout, ended.stderr
    told = json.loads(ended.stdout)
    assert told["failures"] == []
    assert told["passed"] is True
    assert ended.returncode == 0, ended.stderr
    figures = {row["name"]: row["value"] for row in told["rows"]}
    assert figures["requests/answered"] > 10
    assert {figures[f"requests/{bad}"] for bad in ("lost", "wrong", "repeated")} == {0}
    assert figures["leaked/blocks"] == 0
    assert len(told["blocks"]) == 3
    assert {fault["kind"].split("-")[0] for fault in told["faults"]} == {"kill", "stop"}
    assert figures["stall-beyond/p99"] <= 3
    # Of who is not struck: no descriptors and threads more, as in a soak.
    assert {growth["name"] for growth in told["growth"]} == {"prefill"}
    assert any(name.startswith("growth/prefill-") for name in figures)
    assert "<span class='passed'>" in page.read_text()


def test_a_page_with_another_name_is_refused_before_anything_starts(tmp_path):
    result = CliRunner().invoke(main, ["chaos", "--report", str(tmp_path / "chaos.png")])
    assert result.exit_code == 1
    assert "has to end in .html" in result.output


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--soak"],
        ["--routers", "1"],
        ["--fault", "kill-decode", "--rate", "2.5"],
        ["smollm2", "--rate", "0.5"],
        ["a folder/of a model", "--soak"],
    ],
)
def test_what_is_told_to_play_it_again_asks_for_the_same(options):
    def asked(words: list[str]) -> Chaos:
        context = commands.chaos.make_context("chaos", list(words))
        others = ("as_json", "page")
        choice = {name: value for name, value in context.params.items() if name not in others}
        return Chaos(**commands._completed(choice))

    first = asked(options)
    assert first.model == (options[0] if options and options[0][0] != "-" else TINY)
    assert asked(shlex.split(first.play_again)[2:]) == first
    assert first.minutes == (20 if first.soak else 10)
    assert ("kill-router" in first.kinds) == ("--fault" not in options and first.routers > 1)


# ---- an answer over HTTP, from a router that sends what it is told


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def read(*sent: bytes) -> list[Piece]:
    async def serve(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"".join(sent))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return [piece async for piece in pieces(f"127.0.0.1:{port}", "/v1/completions", {})]


async def test_an_answer_is_read_wherever_its_chunks_are_cut():
    body = event("a") + event("é") + event("", "length") + b"data: [DONE]\n\n"
    cut = [chunk(body[at : at + 7]) for at in range(0, len(body), 7)]
    assert await read(HEAD, *cut, b"0\r\n\r\n") == [
        Piece("a", ""),
        Piece("é", ""),
        Piece("", "length"),
    ]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([], RouterLostError),
        ([HEAD[:20]], RouterLostError),
        ([HEAD, chunk(event("a"))], RouterLostError),
        ([HEAD, chunk(event("a"))[:-9]], RouterLostError),
        ([HEAD, chunk(event("a")), b"0\r\n\r\n"], RouterLostError),  # no [DONE]
        ([HEAD, chunk(b'data: {"error": {"message": "no"}}\n')], AnswerFailedError),
        ([b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno"], AnswerFailedError),
        ([b"HTTP/1.1 503 No\r\nretry-after: 2\r\ncontent-length: 2\r\n\r\nno"], RefusedError),
    ],
)
async def test_what_is_not_whole_is_told_by_whose_fault_it_is(sent, error):
    with pytest.raises(error):
        await read(*sent)


async def test_a_router_that_is_not_there_is_lost():
    with silent_address() as address, pytest.raises(RouterLostError):
        async for _ in pieces(address, "/v1/completions", {}):
            pass
