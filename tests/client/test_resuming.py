"""Clients whose server is lost in the middle of an answer, against scripted servers: whom they ask
next, for what, and that nothing is shown twice or left out."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from scripted_server import (
    DEADLINE_S,
    Hold,
    Refusal,
    ScriptedServer,
    Step,
    accepted,
    answer,
    delta,
    finished,
    scripted_server,
)

from kvrelay.client import AsyncClient, Client, Completion, KvrelayError
from kvrelay.peer import Peer
from kvrelay.wire import inference_pb2 as pb

Code = grpc.StatusCode
LOST = Refusal(Code.UNAVAILABLE, "Socket closed")  # as gRPC says it
NOT_FOUND = Refusal(Code.NOT_FOUND, "no worker keeps it")
NO_SERVER = "127.0.0.1:1"  # nobody but root can listen there, and nobody does


@pytest.fixture
def servers() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted_server() as one, scripted_server() as other:
        yield one, other


def addresses(*servers: ScriptedServer) -> str:
    return ",".join(server.address for server in servers)


Reader = Callable[..., tuple[str, Completion]]


def full(retry_ms: int) -> Refusal:
    return Refusal(Code.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", str(retry_ms)),))


def read(address: str, *, resume_for_s: float = 30.0, **options: Any) -> tuple[str, Completion]:
    with Client(address, timeout_s=DEADLINE_S, resume_for_s=resume_for_s) as client:
        stream = client.generate("hi", **options)
        return "".join(stream), stream.result()


def read_async(address: str, *, resume_for_s: float = 30.0, **options: Any) -> Any:
    async def reading() -> tuple[str, Completion]:
        async with AsyncClient(address, timeout_s=DEADLINE_S, resume_for_s=resume_for_s) as client:
            stream = client.generate("hi", **options)
            text = "".join([piece async for piece in stream])
            return text, await stream.result()

    return asyncio.run(reading())


both = pytest.mark.parametrize("read", [read, read_async])


def begun(*pieces: str, then: Step = LOST) -> list[Step]:
    """An answer up to a loss; it is kept at d1."""
    first = delta(0, [100], pieces[0], kept_at="d1")
    return [accepted(), first, *(delta(n, [100 + n], p) for n, p in enumerate(pieces) if n), then]


# ---- where it goes on


@both
def test_another_server_goes_on_where_it_broke_off(servers, read: Reader):
    one, other = servers
    one.scripts = [begun("a", "b")]
    other.scripts = [[accepted(), delta(2, [102], "c"), finished(3)]]
    text, completion = read(addresses(one, other))
    assert text == completion.text == "abc"
    assert (completion.token_ids, completion.resumed) == ((100, 101, 102), 1)
    [asked] = other.requests
    assert asked == pb.ResumeRequest(request_id="r-1", next_offset=2, kept_at="d1", nonce=2**63)


@both
def test_the_newest_place_where_it_is_kept_is_named(servers, read: Reader):
    one, other = servers
    one.scripts = [[*begun("a", "b")[:-1], delta(2, [102], "c", kept_at="d2"), LOST]]
    other.scripts = [[accepted(), delta(3, [103], "d", kept_at="d3"), LOST]]
    one.scripts.append([accepted(), finished(4)])
    text, completion = read(addresses(one, other))
    assert (text, completion.resumed) == ("abcd", 2)
    assert other.requests[0].kept_at == "d2"
    [_, asked] = one.requests
    assert asked == pb.ResumeRequest(request_id="r-1", next_offset=4, kept_at="d3", nonce=2**63)


@both
def test_what_nobody_keeps_is_asked_for_again_by_its_seed(servers, read: Reader):
    one, other = servers
    one.scripts = [begun("a", "b", "c")]
    again = [delta(0, [100, 101], "ab"), delta(2, [102, 103], "cd"), delta(4, [104], "e")]
    other.scripts = [[NOT_FOUND], [accepted(), *again, finished(5)]]
    text, completion = read(addresses(one, other), temperature=1.0, ttft_deadline_ms=50)
    assert text == completion.text == "abcde"
    assert completion.token_ids == (100, 101, 102, 103, 104)
    assert other.requests[1] == pb.GenerateRequest(
        request_id="r-1", text="hi", sampling=pb.SamplingParams(temperature=1.0, seed=7)
    )


@both
def test_text_that_was_held_back_is_shown_once(servers, read: Reader):
    """Nobody can tell by the tokens that a client has it."""
    one, other = servers
    one.scripts = [[*begun("a", "b")[:-1], delta(2, [], "held"), LOST]]
    other.scripts = [[accepted(), delta(2, [], "held"), LOST]]
    one.scripts.append([NOT_FOUND])
    one.scripts.append([accepted(), delta(0, [100, 101], "ab"), delta(2, [], "held"), finished(2)])
    text, completion = read(addresses(one, other))
    assert text == completion.text == "abheld"


@both
def test_before_it_is_accepted_it_is_simply_asked_again(servers, read: Reader):
    one, other = servers
    one.scripts = [[LOST]]
    text, completion = read(addresses(one, other), request_id="mine")
    assert (text, completion.resumed) == ("Hello", 1)
    assert other.requests == one.requests


def test_an_id_that_still_runs_is_given_up(servers):
    one, other = servers
    one.scripts = [begun("a")]
    other.scripts = [[NOT_FOUND], [Refusal(Code.ALREADY_EXISTS, "r-1 is running")]]
    other.scripts.append([accepted(request_id="r-2"), *answer("a", "b")[1:]])
    text, completion = read(addresses(one, other))
    assert (text, completion.request_id) == ("ab", "r-2")
    assert [r.request_id for r in other.requests] == ["r-1", "r-1", ""]


def test_the_same_server_is_asked_when_there_is_no_other():
    with scripted_server() as one:
        one.scripts = [begun("a"), [LOST], [accepted(), delta(1, [101], "b"), finished(2)]]
        assert read(one.address)[0] == "ab"
        assert [r.next_offset for r in one.requests[1:]] == [1, 1]


def test_a_chat_goes_on_as_a_chat(servers):
    one, other = servers
    one.scripts = [begun("a")]
    other.scripts = [[NOT_FOUND], answer("a", "b")]
    with Client(addresses(one, other), timeout_s=DEADLINE_S) as client:
        assert client.chat("hi").result().text == "ab"
    assert [message.content for message in other.requests[1].messages] == ["hi"]


def test_a_connection_that_really_breaks(servers):
    one, other = servers
    one.scripts = [[*begun("a", then=Hold())]]
    other.scripts = [[accepted(), delta(1, [101], "b"), finished(2)]]
    with Client(addresses(one, other), timeout_s=DEADLINE_S) as client:
        stream = client.generate("hi")
        assert next(stream) == "a"
        threading.Thread(target=one.stop).start()
        assert stream.result().text == "ab"


@both
def test_one_that_has_no_room_now_is_asked_again_when_it_says(read: Reader):
    with scripted_server() as one:
        one.scripts = [begun("a"), [full(150)], [NOT_FOUND], [full(150)], answer("a", "b")]
        started = time.monotonic()
        assert read(one.address)[0] == "ab"
        assert time.monotonic() - started >= 0.3
        assert [type(r).__name__ for r in one.requests[1:]] == [
            *("ResumeRequest", "ResumeRequest", "GenerateRequest", "GenerateRequest")
        ]


@both
def test_one_that_has_no_room_is_passed_over_for_one_that_has(servers, read: Reader):
    one, other = servers
    one.scripts = [begun("a")]
    other.scripts = [[full(20_000)]]
    with scripted_server() as third:
        third.scripts = [[accepted(), delta(1, [101], "b"), finished(2)]]
        started = time.monotonic()
        assert read(addresses(one, other, third))[0] == "ab"
    assert time.monotonic() - started < 20


@both
def test_its_waits_end_with_the_time_that_it_may_take(servers, read: Reader):
    one, other = servers
    one.scripts = [begun("a"), [full(20_000)], [full(20_000)]]
    other.scripts = [[full(20_000)], [full(20_000)]]
    started = time.monotonic()
    with pytest.raises(KvrelayError, match="full"):
        read(addresses(one, other), resume_for_s=0.3)
    assert 0.3 <= time.monotonic() - started < 20
    assert len(one.requests) + len(other.requests) == 4  # once more at the end


# ---- where it does not


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(Code.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "30"),)),
        Refusal(Code.INTERNAL, "workers died of it"),
        Refusal(Code.INVALID_ARGUMENT, "too long"),
        Refusal(Code.ABORTED, "resumed in another call"),
        Refusal(Code.UNAVAILABLE, "failed 3 times", (("grpc-retry-pushback-ms", "1000"),)),
    ],
    ids=lambda refusal: refusal.code.name,
)
def test_what_a_server_says_itself_is_final(servers, refusal: Refusal):
    one, other = servers
    one.scripts = [begun("a", then=refusal)]
    with pytest.raises(KvrelayError) as caught:
        read(addresses(one, other))
    assert (caught.value.code, str(caught.value)) == (refusal.code, refusal.details)
    assert other.requests == []


def test_it_can_be_turned_off(servers):
    one, other = servers
    one.scripts = [begun("a")]
    with pytest.raises(KvrelayError, match="broke off"):
        read(addresses(one, other), resume_for_s=0)
    assert other.requests == []


def test_it_is_given_up_after_a_while(servers):
    one, other = servers
    one.scripts = [begun("a"), [LOST]]
    other.scripts = [[LOST]]
    started = time.monotonic()
    with pytest.raises(KvrelayError, match="broke off"):
        read(addresses(one, other), resume_for_s=0.3)
    assert time.monotonic() - started >= 0.3
    assert len(other.requests) >= 2


def test_its_deadline_is_that_of_the_whole_request(servers):
    one, other = servers
    one.scripts = [begun("a")]
    other.scripts = [[Hold()]]
    with Client(addresses(one, other)) as client:
        stream = client.generate("hi", timeout_s=0.4)
        with pytest.raises(KvrelayError, match=r"within 0\.4 s") as caught:
            stream.result()
    assert caught.value.code is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ([delta(2, [102], "c")], "token 2 of the answer where token 1 was due"),
        ([delta(0, [100], "a")], "token 0 of the answer where token 1 was due"),
        ([NOT_FOUND, accepted(), delta(0, [99], "a")], "another answer the second time"),
        ([NOT_FOUND, accepted(), delta(0, [100], "x")], "another answer the second time"),
        ([NOT_FOUND, accepted(seed=8)], "with another seed"),
        ([NOT_FOUND, accepted(), finished(0)], "ended the answer before what had come"),
    ],
)
def test_a_server_that_goes_on_with_something_else(servers, again: list[Step], message: str):
    one, other = servers
    one.scripts = [begun("a")]
    if again[0] is NOT_FOUND:
        other.scripts = [[NOT_FOUND], again[1:]]
    else:
        other.scripts = [[accepted(), *again]]
    with pytest.raises(KvrelayError, match=message) as caught:
        read(addresses(one, other))
    assert caught.value.code is Code.INTERNAL


def test_cancel_wakes_one_that_waits_to_ask_again():
    with scripted_server() as one, Client(one.address, timeout_s=DEADLINE_S) as client:
        hint = (("grpc-retry-pushback-ms", "60000"),)
        one.scripts = [begun("a"), [Refusal(Code.RESOURCE_EXHAUSTED, "full", hint)]]
        stream = client.generate("hi")
        assert next(stream) == "a"
        canceller = threading.Timer(0.3, stream.cancel)
        canceller.start()
        for _ in range(2):
            with pytest.raises(KvrelayError, match="cancelled") as caught:
                stream.result()
            assert caught.value.code is Code.CANCELLED
        canceller.join()


# ---- several addresses


@both
def test_a_server_that_is_not_there_is_passed_over(servers, read: Reader):
    _, other = servers
    assert read(f"{NO_SERVER}, {other.address}")[0] == "Hello"


def test_who_answers_is_asked_first_from_then_on(servers):
    one, other = servers
    one.stop()
    with Client(addresses(one, other), timeout_s=DEADLINE_S) as client:
        assert client.models()[0].name == "tiny"
        for _ in range(2):
            assert client.generate("hi").result().text == "Hello"
        assert client._servers.first == 1


async def test_unary_calls_go_to_whoever_is_there(servers):
    one, other = servers
    one.stop()
    async with AsyncClient(addresses(one, other), timeout_s=DEADLINE_S) as client:
        assert (await client.models())[0].name == "tiny"
        other.refusal = Refusal(Code.NOT_FOUND, "no such model")
        with pytest.raises(KvrelayError, match="no such model"):
            await client.tokenize("a")


@both
def test_nobody_is_there(read: Reader):
    started = time.monotonic()
    with pytest.raises(KvrelayError, match=r"nothing answers at 127\.0\.0\.1:2"):
        read("127.0.0.1:1,127.0.0.1:2")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("address", ["", "a:1,", ",a:1", "a:1,b"])
def test_every_address_is_checked(address: str):
    with pytest.raises(KvrelayError, match="HOST:PORT"):
        Client(address)


@pytest.mark.parametrize(
    ("code", "details", "lost"),
    [
        ("UNAVAILABLE", "Stream removed (ping timeout)", True),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", True),
        ("INTERNAL", "Received RST_STREAM with error code 2", True),
        ("UNAVAILABLE", "failed to connect to all addresses; Connection reset by peer", False),
        ("UNAVAILABLE", "no decode worker is connected", False),
        ("INTERNAL", "workers died of it", False),
        ("DEADLINE_EXCEEDED", "Stream removed (Deadline Exceeded)", False),
    ],
)
def test_what_counts_as_a_loss(code: str, details: str, lost: bool):
    assert Peer("h:1", 3.0).explain(Code[code], details).lost is lost
