"""The public service's handlers, called as gRPC calls them; there are no workers."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from byte_tokenizer import byte_level_tokenizer
from tokenizers import normalizers

from kvrelay.config import RouterConfig
from kvrelay.wire import inference_pb2 as pb
from router import prompts
from router.admission import InvalidRequest
from router.callers import ANYBODY, Callers
from router.fleet import Fleet
from router.frontdoor import FrontDoor
from router.guard import CALLER
from router.model_files import ModelFiles
from router.quotas import Quota
from router.service import InferenceService

DEADLINE_S = 10.0  # only a broken test waits this long


class Aborted(Exception):
    """What context.abort raises."""


class Context:
    def __init__(self) -> None:
        self.accepted = asyncio.Event()
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.nonce = 0

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, message: pb.GenerateResponse) -> None:
        self.nonce = message.accepted.nonce or self.nonce
        self.accepted.set()

    async def abort(self, code: grpc.StatusCode, details: str, *_: Any) -> None:
        self.code, self.details = code, details
        raise Aborted


@contextlib.asynccontextmanager
async def service_of(**config: Any) -> AsyncIterator[tuple[InferenceService, FrontDoor]]:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.Strip()
    files = ModelFiles(
        name="tiny",
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=1000,
        eos_token_ids=(),
        tokenizer=tokenizer,
        chat_template="{{ messages[0].content }}",
        special_tokens={},
        longest_token_bytes=100,
    )
    fleet = Fleet(
        RouterConfig(
            model_path=Path("none"),
            model_name="tiny",
            cluster_key="k" * 16,
            control_socket=Path("none"),
            **config,
        )
    )
    door = FrontDoor(files, fleet, Callers())
    CALLER.set(ANYBODY)  # as the guard does
    yield InferenceService(door), door
    await door.close()
    await fleet.close()


@pytest.mark.parametrize("refused", ["same", "other"])
async def test_a_request_that_was_not_accepted_does_not_outlive_its_refusal(refused):
    async with service_of(queue_max=1) as (service, door), asyncio.timeout(DEADLINE_S):
        first = Context()
        waits = asyncio.create_task(
            service.Generate(pb.GenerateRequest(text="a", request_id="same"), first)
        )
        await first.accepted.wait()
        second = Context()
        with pytest.raises(Aborted):
            await service.Generate(pb.GenerateRequest(text="a", request_id=refused), second)
        codes = {
            "same": grpc.StatusCode.ALREADY_EXISTS,
            "other": grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
        assert second.code is codes[refused]
        drained = asyncio.create_task(door.drain())
        await asyncio.sleep(0)
        assert not drained.done(), "the first one is still running"
        waits.cancel()
        await drained
        with pytest.raises(asyncio.CancelledError):
            await waits


async def test_a_call_that_takes_over_a_request_takes_over_its_quota(monkeypatch):
    monkeypatch.setattr(Fleet, "not_ready", "")
    async with service_of() as (service, door), asyncio.timeout(DEADLINE_S):
        CALLER.set(replace(ANYBODY, quota=Quota(requests_at_once=1, tokens_per_minute=1000)))
        first, second = Context(), Context()
        message = pb.GenerateRequest(text="a", request_id="mine")
        waits = asyncio.create_task(service.Generate(message, first))
        await first.accepted.wait()
        [account] = door._quotas._accounts.values()
        held = account.running, account.kv_tokens, account.tokens.level
        wish = pb.ResumeRequest(request_id="mine", nonce=first.nonce)
        resumed = asyncio.create_task(service.Resume(wish, second))
        await second.accepted.wait()
        with pytest.raises(Aborted):
            await waits
        assert first.code is grpc.StatusCode.ABORTED
        assert (account.running, account.kv_tokens, account.tokens.level) == held
        resumed.cancel()
        await door.drain()
        assert (account.running, account.kv_tokens, door._leases) == (0, 0, {})


async def test_a_failure_while_letting_go_does_not_hold_up_the_drain(monkeypatch):
    async with service_of() as (service, door), asyncio.timeout(DEADLINE_S):
        context = Context()
        waits = asyncio.create_task(service.Generate(pb.GenerateRequest(text="a"), context))
        await context.accepted.wait()

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(door._fleet, "let_go", broken)
        waits.cancel()
        await door.drain()
        with pytest.raises(RuntimeError, match="broken"):
            await waits


@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
async def test_a_text_of_which_no_token_comes_is_the_clients_mistake(method):
    async with service_of() as (service, _):
        message = pb.TokenizeRequest if method == "Tokenize" else pb.GenerateRequest
        context = Context()
        with pytest.raises(Aborted):
            await getattr(service, method)(message(text="  "), context)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert context.details == "text: no token comes of it"


@pytest.mark.parametrize("message", [pb.GenerateRequest, pb.ChatRequest, pb.TokenizeRequest])
async def test_a_model_name_without_end_is_not_echoed_whole(message):
    async with service_of() as (service, _):
        context = Context()
        method = getattr(service, message.DESCRIPTOR.name.removesuffix("Request"))
        chat = message is pb.ChatRequest
        asked = {"messages": [pb.ChatMessage(role="user", content="hi")]} if chat else {}
        with pytest.raises(Aborted):
            await method(message(model="x" * (1 << 20), **asked), context)
        assert context.code is grpc.StatusCode.NOT_FOUND
        assert len(context.details) < 300
        assert context.details.endswith("is not served here; 'tiny' is")


@pytest.mark.parametrize(("length", "on_loop"), [(1, True), (5000, False)])
async def test_long_texts_are_tokenized_off_the_loop(monkeypatch, length, on_loop):
    async with service_of() as (service, _):
        threads = []

        def encode(*_: Any) -> list[int]:
            threads.append(threading.current_thread().name)
            raise InvalidRequest("text: no token comes of it")

        monkeypatch.setattr(prompts, "_encode", encode)
        with pytest.raises(Aborted):
            await service.Generate(pb.GenerateRequest(text="a" * length), Context())
        [name] = threads
        assert (threading.current_thread().name == name) == on_loop
        assert name.startswith("texts") != on_loop


async def test_how_urgent_a_request_is_reaches_the_queue(monkeypatch):
    async with service_of() as (service, door), asyncio.timeout(DEADLINE_S):
        submitted = []
        submit = door._fleet.submit
        monkeypatch.setattr(
            door._fleet, "submit", lambda request: submitted.append(request) or submit(request)
        )
        context = Context()
        message = pb.GenerateRequest(text="a", priority=-7, ttft_deadline_ms=900)
        waits = asyncio.create_task(service.Generate(message, context))
        await context.accepted.wait()
        assert (submitted[0].priority, submitted[0].ttft_deadline_ms) == (-7, 900)
        refused = Context()
        with pytest.raises(Aborted):
            await service.Generate(pb.GenerateRequest(text="a", priority=-101), refused)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        waits.cancel()
        await door.drain()
