"""kvrelay.client against a scripted server over real gRPC, blocking and asynchronous."""

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from ports import silent_address
from scripted_server import (
    DEADLINE_S,
    Hold,
    Refusal,
    ScriptedServer,
    accepted,
    answer,
    delta,
    finished,
    scripted_server,
)

from kvrelay.client import (
    AsyncClient,
    Client,
    Completion,
    Delta,
    KvrelayError,
    Model,
    Timings,
    Tokens,
)
from kvrelay.peer import Peer
from kvrelay.wire import inference_pb2 as pb

TIMINGS = Timings(1.5, 20.0, 25.0, 10.0, 4_000_000, 2.0, 0.5, "shm")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as double:
        yield double


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        yield client


@pytest.fixture
def nobody() -> Iterator[str]:
    with silent_address() as address:
        yield address


def failure_of(client: Client) -> KvrelayError:
    with pytest.raises(KvrelayError) as caught, client.generate("hi") as stream:
        stream.result()
    return caught.value


# ---- what is asked


def test_text_token_ids_and_every_option_reach_the_server(
    server: ScriptedServer, client: Client
) -> None:
    client.generate("naïve 日本語 🦊", model="tiny", request_id="mine").result()
    client.generate([1, 2, 3], max_tokens=9, temperature=0.5, top_k=4, top_p=0.9).result()
    client.generate("", seed=2**64 - 1, stop=["a", "b"]).result()
    text, ids, seeded = server.requests
    assert text == pb.GenerateRequest(
        text="naïve 日本語 🦊", model="tiny", request_id="mine", sampling=pb.SamplingParams()
    )
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert ids.sampling == pb.SamplingParams(max_tokens=9, temperature=0.5, top_k=4, top_p=0.9)
    assert seeded.WhichOneof("prompt") == "text"
    assert seeded.sampling == pb.SamplingParams(seed=2**64 - 1, stop=["a", "b"])


def test_every_extra_of_sampling_reaches_the_server(server: ScriptedServer, client: Client) -> None:
    extras: Any = {
        "min_p": 0.0,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": [0, 7],
    }
    client.generate("hi", **extras).result()
    client.chat("hi", **extras).result()
    client.generate("hi").result()
    generated, chatted, plain = (request.sampling for request in server.requests)
    assert generated == chatted == pb.SamplingParams(**extras)
    assert plain == pb.SamplingParams()
    for name in ("min_p", "min_tokens"):
        assert generated.HasField(name)


def test_how_urgent_a_request_is_reaches_the_server(server: ScriptedServer, client: Client) -> None:
    client.generate("hi", priority=-5, ttft_deadline_ms=250).result()
    client.chat("hi", priority=7).result()
    urgent, patient = server.requests
    assert (urgent.priority, urgent.ttft_deadline_ms) == (-5, 250)
    assert (patient.priority, patient.ttft_deadline_ms) == (7, 0)


@pytest.mark.parametrize(
    ("hint", "retry_ms"), [("1500", 1500), ("0", 0), ("-1", None), ("soon", None), (None, None)]
)
async def test_the_hint_to_try_again_is_on_the_error(
    server: ScriptedServer, hint: str | None, retry_ms: int | None
) -> None:
    trailing = (("grpc-retry-pushback-ms", hint),) if hint is not None else ()
    server.scripts = [[Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailing)]]
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        assert failure_of(client).retry_ms == retry_ms
    async with AsyncClient(server.address, timeout_s=DEADLINE_S) as asking:
        with pytest.raises(KvrelayError) as caught:
            await asking.generate("hi").result()
        assert caught.value.retry_ms == retry_ms


def test_zero_is_sent_and_none_is_not(server: ScriptedServer, client: Client) -> None:
    client.generate("hi", temperature=0, top_k=0, seed=0, max_tokens=None).result()
    sampling = server.requests[0].sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("top_k")
    assert sampling.HasField("seed")
    assert not sampling.HasField("max_tokens")


def test_one_stop_string_is_not_taken_apart(server: ScriptedServer, client: Client) -> None:
    client.generate("hi", stop="END").result()
    assert list(server.requests[0].sampling.stop) == ["END"]


def test_chat_sends_messages_and_a_text_as_one_of_the_user(
    server: ScriptedServer, client: Client
) -> None:
    client.chat("hi", max_tokens=3).result()
    client.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ho"}]
    ).result()
    one, two = server.requests
    assert one == pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="hi")],
        sampling=pb.SamplingParams(max_tokens=3),
    )
    assert [(m.role, m.content) for m in two.messages] == [("system", "Be brief."), ("user", "ho")]


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"max_tokens": 2**40}, {"stop": ["\udce9"]}, {"model": "\ud800"}]
)
def test_a_value_that_does_not_fit_is_refused_before_it_is_sent(
    server: ScriptedServer, client: Client, options: dict[str, object]
) -> None:
    with pytest.raises(KvrelayError) as caught:
        client.generate("hi", **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert not server.requests


def test_misuse_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="max_token"):
        client.generate("hi", max_token=3)
    with pytest.raises(TypeError, match="bytes"):
        client.generate(b"hi")


def test_a_chat_message_with_an_unknown_key_is_refused(client: Client) -> None:
    with pytest.raises(KvrelayError, match="name"):
        client.chat([{"role": "user", "content": "hi", "name": "me"}])


@pytest.mark.parametrize(
    "address", ["", "localhost", "127.0.0.1:99999", "127.0.0.1:0", ":5", "http://127.0.0.1:80"]
)
def test_an_address_that_grpc_would_misread_is_refused(address: str) -> None:
    with pytest.raises(KvrelayError, match="HOST:PORT"):
        Client(address)


# ---- what comes back


def test_text_comes_as_it_is_made(server: ScriptedServer, client: Client) -> None:
    gate = threading.Event()
    server.scripts = [
        [
            accepted(),
            delta(0, [1], "日"),
            gate,
            delta(1, [2], ""),
            delta(1 + 1, [3], "本"),
            finished(3),
        ]
    ]
    with client.generate("hi") as stream:
        assert next(stream) == "日"  # the server goes on only when this has come
        gate.set()
        assert list(stream) == ["本"]
        assert stream.result().text == "日本"


def test_result_holds_the_whole_answer(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[*answer("a", "b")[:-1], finished(2, pb.FINISH_REASON_LENGTH)]]
    stream = client.generate("hi")
    assert next(stream) == "a"
    expected = Completion("ab", (100, 101), "length", 5, 2, 7, "r-1", "tiny", TIMINGS, 3)
    assert stream.result() == expected
    assert stream.result() == expected
    stream.cancel()  # too late to matter
    assert stream.result() == expected


def test_deltas_carry_tokens_and_text_held_back(server: ScriptedServer, client: Client) -> None:
    # The last one is text without tokens, whose offset says nothing.
    server.scripts = [[accepted(), delta(0, [1, 2], "a"), delta(0, [], "b"), finished(2)]]
    deltas = list(client.generate("hi").deltas())
    assert deltas == [Delta(0, (1, 2), "a"), Delta(2, (), "b")]


def test_an_answer_may_be_empty(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[accepted(), finished(0)]]
    assert client.generate("hi").result().text == ""


def test_tokenize_and_models(client: Client) -> None:
    assert client.tokenize("né") == Tokens((110, 233), ("n", "é"))
    assert client.models() == (Model("tiny", 2048, 512, True),)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([accepted(), delta(0, [1], "a"), delta(2, [3], "c")], "token 2 .* token 1 was due"),
        ([accepted(), delta(0, [1, 2], "a"), delta(1, [2], "b")], "token 1 .* token 2 was due"),
        ([delta(0, [1], "a")], "delta before the request was accepted"),
        ([accepted(), accepted()], "accepted before the answer was finished"),
        ([accepted(), finished(0), finished(0)], "finished after the answer was finished"),
        ([pb.GenerateResponse()], "unknown"),
        ([accepted(), finished(0, pb.FINISH_REASON_UNSPECIFIED)], "finish reason"),
        ([], "closed the stream before the request was accepted"),
        ([accepted(), delta(0, [1], "a")], "closed the stream before the answer was finished"),
    ],
)
def test_a_broken_contract_is_an_internal_error(
    server: ScriptedServer, client: Client, script: list, message: str
) -> None:
    server.scripts = [script]
    stream = client.generate("hi")
    for _ in range(2):  # and stays one
        with pytest.raises(KvrelayError, match=message) as caught:
            stream.result()
        assert caught.value.code is grpc.StatusCode.INTERNAL


def test_a_broken_contract_cancels_the_request(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[accepted(), delta(5, [1], "a"), Hold()]]
    with pytest.raises(KvrelayError):
        client.generate("hi").result()
    assert server.cancelled.wait(DEADLINE_S)


# ---- ends before the end


def test_cancel_reaches_the_server(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    stream = client.generate("hi")
    assert next(stream) == "a"
    stream.cancel()
    assert server.cancelled.wait(DEADLINE_S)
    with pytest.raises(KvrelayError, match="the request was cancelled") as caught:
        stream.result()
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_cancel_from_another_thread_wakes_the_reader(
    server: ScriptedServer, client: Client
) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    stream = client.generate("hi")
    assert next(stream) == "a"
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    with pytest.raises(KvrelayError, match="cancelled"):
        next(stream)
    canceller.join()


def test_leaving_the_block_cancels(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    with client.generate("hi") as stream:
        next(stream)
    assert server.cancelled.wait(DEADLINE_S)


def test_closing_the_client_cancels(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    with Client(server.address) as client:
        stream = client.generate("hi")
        next(stream)
    assert server.cancelled.wait(DEADLINE_S)
    with pytest.raises(KvrelayError, match="the request was cancelled") as caught:
        stream.result()
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_a_request_ends_at_its_deadline(server: ScriptedServer, client: Client) -> None:
    server.scripts = [[Hold()]]
    with pytest.raises(KvrelayError, match=r"did not finish the request within 0\.05 s") as caught:
        client.generate("hi", timeout_s=0.05).result()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


# ---- errors


def test_the_servers_own_words_are_kept_on_one_line(server: ScriptedServer, client: Client) -> None:
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full;\nretry in 2 s")
    server.scripts = [[accepted(), delta(0, [1], "a"), refusal]]
    server.refusal = refusal
    error = failure_of(client)
    assert (error.code, str(error)) == (refusal.code, "queue full; retry in 2 s")
    for call in (client.models, lambda: client.tokenize("a")):
        with pytest.raises(KvrelayError, match="queue full; retry in 2 s"):
            call()


def test_a_server_that_is_not_ready_is_not_taken_for_none(
    server: ScriptedServer, client: Client
) -> None:
    server.scripts = [[Refusal(grpc.StatusCode.UNAVAILABLE, "no decode worker is up")]]
    assert str(failure_of(client)) == "no decode worker is up"


def test_nothing_listening(nobody: str) -> None:
    expected = f"nothing answers at {nobody}; start a server with `kvrelay serve MODEL`"
    with Client(nobody) as client:
        error = failure_of(client)
        assert (error.code, str(error)) == (grpc.StatusCode.UNAVAILABLE, expected)
        with pytest.raises(KvrelayError, match="nothing answers"):
            client.models()


def test_the_servers_refusal_of_a_huge_prompt_is_seen() -> None:
    with scripted_server(message_bytes_max=2**20) as server, Client(server.address) as client:
        with pytest.raises(KvrelayError, match=r"SERVER.*larger than max") as caught:
            client.generate("a" * 20_000_000).result()
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("key", ["kvr one", "kvr\n", "schlüssel"])
def test_what_can_be_no_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(KvrelayError, match="has characters that no key has") as caught:
        Client(api_key=key)
    assert key not in str(caught.value)


def test_a_folder_of_certificates_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KvrelayError, match=r"has no ca\.pem"):
        Client(certificates=tmp_path)
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(KvrelayError, match="not usable"):
        Client(certificates=tmp_path)


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        ("UNAVAILABLE", "Stream removed (Socket closed)", "connection to h:1 broke off"),
        ("UNAVAILABLE", "failed to connect to all addresses; no route", "cannot reach h:1"),
        ("UNAVAILABLE", "errors resolving h:1: not found", "cannot reach h:1: errors resolving"),
        ("DEADLINE_EXCEEDED", "prefill took too long", "^prefill took too long$"),
        ("UNKNOWN", "", r"h:1 failed without a word \(UNKNOWN\)"),
    ],
)
def test_grpcs_words_are_made_clear(code: str, details: str, message: str) -> None:
    error = Peer("h:1", 3.0).explain(grpc.StatusCode[code], details)
    assert error.code is grpc.StatusCode[code]
    with pytest.raises(KvrelayError, match=message):
        raise error


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(KvrelayError(grpc.StatusCode.ABORTED, "gone", 5)))
    assert (error.code, str(error), error.retry_ms) == (grpc.StatusCode.ABORTED, "gone", 5)


def test_the_client_loads_no_model_code() -> None:
    check = (
        "import sys, kvrelay.client; "
        "sys.exit(bool({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], timeout=DEADLINE_S).returncode == 0


# ---- the asynchronous client


async def reached(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, DEADLINE_S)


async def test_async_text_comes_as_it_is_made(server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[accepted(), delta(0, [1], "日"), gate, delta(1, [2], "本"), finished(2)]]
    async with AsyncClient(server.address) as client, client.generate("hi", seed=3) as stream:
        assert await anext(stream) == "日"
        gate.set()
        assert [text async for text in stream] == ["本"]
        expected = Completion("日本", (1, 2), "stop", 5, 2, 7, "r-1", "tiny", TIMINGS, 3)
        assert await stream.result() == expected
        stream.cancel()
        assert await stream.result() == expected
    assert server.requests[0].sampling.seed == 3


async def test_async_chat_tokenize_models_and_deltas(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        deltas = [d async for d in client.chat("hi").deltas()]
        assert deltas == [Delta(0, (100,), "Hel"), Delta(1, (101,), "lo")]
        assert await client.tokenize("a") == Tokens((97,), ("a",))
        assert await client.models() == (Model("tiny", 2048, 512, True),)
    assert server.requests[0].messages[0].content == "hi"


async def test_async_streams_run_side_by_side(server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[accepted(), delta(0, [1], "a"), gate, finished(1)], answer("b")]
    async with AsyncClient(server.address) as client:
        first = client.generate("one")
        assert await anext(first) == "a"
        held = asyncio.create_task(first.result())
        assert (await client.generate("two").result()).text == "b"
        assert not held.done()
        gate.set()
        assert (await held).text == "a"


async def test_async_gap(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(1, [1], "a"), Hold()]]
    async with AsyncClient(server.address) as client:
        stream = client.generate("hi")
        for _ in range(2):
            with pytest.raises(KvrelayError, match="token 0 was due") as caught:
                await stream.result()
            assert caught.value.code is grpc.StatusCode.INTERNAL
    assert await reached(server.cancelled)


async def test_async_cancel_reaches_the_server(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    async with AsyncClient(server.address) as client:
        stream = client.generate("hi")
        await anext(stream)
        stream.cancel()
        for _ in range(2):
            with pytest.raises(KvrelayError, match="the request was cancelled") as caught:
                await stream.result()
            assert caught.value.code is grpc.StatusCode.CANCELLED
        assert await reached(server.cancelled)


async def test_async_leaving_the_block_cancels(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    async with AsyncClient(server.address) as client:
        async with client.generate("hi") as stream:
            await anext(stream)
        assert await reached(server.cancelled)


async def test_a_cancelled_task_cancels_its_request(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    async with AsyncClient(server.address) as client:
        stream = client.generate("hi")
        await anext(stream)
        task = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await reached(server.cancelled)


async def test_closing_the_async_client_ends_a_reader_elsewhere(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    client = AsyncClient(server.address)
    stream = client.generate("hi")
    await anext(stream)
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(KvrelayError, match="cancelled"):
        await reader


async def test_async_errors(server: ScriptedServer, nobody: str) -> None:
    server.scripts = [[Refusal(grpc.StatusCode.NOT_FOUND, "no model of that name")], [Hold()]]
    async with AsyncClient(server.address) as client:
        stream = client.generate("hi")
        for _ in range(2):
            with pytest.raises(KvrelayError, match="no model of that name") as caught:
                await stream.result()
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
        with pytest.raises(KvrelayError, match=r"within 0\.05 s"):
            await client.generate("hi", timeout_s=0.05).result()
    async with AsyncClient(nobody) as client:
        with pytest.raises(KvrelayError, match=f"nothing answers at {nobody}"):
            await client.generate("hi").result()
        with pytest.raises(KvrelayError, match="nothing answers"):
            await client.models()
