"""Both ends of a link, on each transport: what is promised for one is promised for all."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import make_certificates
from kv_fixtures import DEADLINE_S, DecodeEnd, decode_end, prefill_end
from links import Gate

from kvrelay.transport.writer_pool import WriterPool


@pytest.fixture(params=["shm", "tcp"])
def transport(request) -> str:
    return request.param


@pytest.fixture
async def decode(transport) -> AsyncIterator[DecodeEnd]:
    async with asyncio.timeout(4 * DEADLINE_S), decode_end(transport=transport) as end:
        yield end


@pytest.fixture
async def prefill(transport) -> AsyncIterator[WriterPool]:
    async with prefill_end(transport=transport) as writers:
        yield writers


@pytest.fixture
async def gate(monkeypatch) -> AsyncIterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> Path:
    """The folder with the certificates of our cluster."""
    return make_certificates(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="session")
def theirs(tmp_path_factory) -> Path:
    """Another cluster's."""
    return make_certificates(tmp_path_factory.mktemp("certificates") / "theirs")
