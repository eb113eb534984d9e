"""`kvrelay bench router`: a real router and its stand-ins, and the bench's own parts."""

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from cluster.bench import router_clock
from cluster.bench.router_load import Load, LoadError
from cluster.bench.router_processes import write_model
from cluster.bench.router_wire import RESOURCE_EXHAUSTED, Connection
from cluster.bench.router_workers import Sequence
from cluster.cli import main
from kvrelay.rpc import make_server
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire import inference_pb2_grpc, worker_pb2
from router.detokenize import Detokenizer
from router.model_files import ModelFiles

DEADLINE_S = 30.0  # only a broken test waits this long
METHOD = "/kvrelay.v1.Inference/Generate"


def test_quick_measures_every_goal():
    result = CliRunner().invoke(main, ["bench", "router", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    compared = {"idle/100", "idle/200", "first-token/p50", "first-token/p99", "stream/most"}
    compared |= {"stream/10000" + part for part in ("", "/coalesced", "/cpu", "/late/p99")}
    assert compared | {"refusal/p50", "refusal/p99"} <= set(rows)
    assert all(rows[name]["ratio"] > 0 for name in compared)
    assert all(row["value"] > 0 for name, row in rows.items() if "added" not in name)
    assert {"first-token/added/p50", "first-token/added/p99"} <= set(rows)
    assert rows["first-token/p99"]["value"] >= rows["first-token/p50"]["value"]


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Answers with as many deltas as tokens are asked for; no tokens are a refusal."""

    def __init__(self) -> None:
        self.asked: list[pb.GenerateRequest] = []
        self.cancelled = asyncio.Event()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        self.asked.append(request)
        tokens = request.sampling.max_tokens
        if not tokens:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        try:
            await context.write(pb.GenerateResponse(accepted=pb.Accepted(request_id="r")))
            for offset in range(tokens):
                delta = pb.Delta(offset=offset, token_ids=[offset], text="x" * 1000)
                await context.write(pb.GenerateResponse(delta=delta))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture
async def server():
    scripted = Scripted()
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield scripted, f"127.0.0.1:{port}"
    await server.stop(grace=None)


async def ask(connection: Connection, tokens: int) -> tuple[list[pb.GenerateResponse], int | None]:
    messages: list[pb.GenerateResponse] = []
    ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
    request = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=tokens))
    connection.call(
        request.SerializeToString(),
        lambda data: messages.append(pb.GenerateResponse.FromString(data)),
        ended.set_result,
    )
    return messages, await ended


async def test_the_wire_reads_what_a_grpc_server_writes(server):
    scripted, address = server
    async with asyncio.timeout(DEADLINE_S):
        connection = await Connection.open(address, METHOD)
        # Together far more than a window that nobody opens wider would let through.
        answers = await asyncio.gather(*(ask(connection, 300) for _ in range(20)))
        connection.close()
    for messages, status in answers:
        assert status == 0
        assert messages[0].accepted.request_id == "r"
        assert [m.delta.offset for m in messages[1:]] == list(range(300))
    assert [request.text for request in scripted.asked] == ["a"] * 20


async def test_the_wire_reads_the_status_of_a_refusal(server):
    async with asyncio.timeout(DEADLINE_S):
        connection = await Connection.open(server[1], METHOD)
        assert await ask(connection, 0) == ([], RESOURCE_EXHAUSTED)
        connection.close()


async def test_a_cancelled_call_ends_at_the_server_and_is_not_heard_of_again(server):
    scripted, address = server
    heard = asyncio.Event()
    async with asyncio.timeout(DEADLINE_S):
        connection = await Connection.open(address, METHOD)
        request = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=1 << 30))
        call = connection.call(
            request.SerializeToString(), lambda _: heard.set(), lambda _: pytest.fail("ended")
        )
        await heard.wait()
        connection.cancel(call)
        await scripted.cancelled.wait()
        connection.close()


async def test_calls_end_with_their_connection(server):
    async with asyncio.timeout(DEADLINE_S):
        connection = await Connection.open(server[1], METHOD)
        waits = asyncio.create_task(ask(connection, 1 << 30))
        await asyncio.sleep(0)
        connection.close()
        assert (await waits)[1] is None


async def test_a_stream_that_ends_early_is_an_error_of_the_load():
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(
        inference_pb2_grpc.InferenceServicer(), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(LoadError, match="ended with status"):
            await Load().hold(f"127.0.0.1:{port}", 3, "accepted")
    await server.stop(grace=None)


def test_a_token_says_when_it_was_made(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(router_clock.time, "monotonic", lambda: now_s)
    token = router_clock.stamp()
    assert 0 <= token < router_clock.VOCAB
    now_s += 1.25
    assert router_clock.late_ms(token) == pytest.approx(1250, abs=0.2)


def test_a_stand_in_repeats_the_first_token_and_ends_at_its_length():
    sequence = Sequence(7, max_tokens=2)
    sequence.first_token = 99
    first, last = sequence.next(), sequence.next()
    assert (first.key, first.offset, list(first.token_ids)) == (7, 0, [99])
    assert first.ending == worker_pb2.ENDING_NONE
    assert (last.offset, last.ending) == (1, worker_pb2.ENDING_LENGTH)


def test_the_model_is_one_that_a_router_serves(tmp_path: Path):
    write_model(tmp_path)
    files = ModelFiles.load(tmp_path, "bench")
    assert files.vocab_size == router_clock.VOCAB
    assert files.tokenizer.get_vocab_size() == router_clock.VOCAB
    assert files.eos_token_ids == ()
    detokenizer = Detokenizer(files.tokenizer)
    assert all(detokenizer.bytes_of(token) for token in (0, 255, 256, router_clock.VOCAB - 1))
