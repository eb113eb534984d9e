"""P and D on two hosts: network namespaces of their own with a wire between them, which is cut."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from link_process import End, Nursery
from namespaces import Wire, two_hosts, why_not

CONNECT_S, REPLY_S, LEASE_S = 0.6, 0.5, 3.0
SLACK_S = 1.0
DEADLINE_S = 20.0  # only a broken test waits this long
PIECES = [1, 15]  # blocks of 1 MiB: more than sockets take in

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)


@dataclass
class Hosts:
    wire: Wire
    prefill: End
    decode: End

    async def reserve(self) -> dict[str, Any]:
        return await self.decode.ask("reserve", count=sum(PIECES))

    async def transfer(self, ticket: str, **options: Any) -> dict[str, Any]:
        self.prefill.forget_events()
        return await self.prefill.ask(
            "transfer", ticket=ticket, pieces=PIECES, content=5, **options
        )

    async def hand_over(self) -> None:
        """One whole transfer, bit for bit."""
        reserved = await self.reserve()
        said = await self.transfer(reserved["ticket"])
        assert said["ending"] == "committed", said
        assert set(said["carried"]) == {"tcp"}
        there = await self.decode.ask("finish", transfer=reserved["transfer"])
        assert there["sums"] == (await self.prefill.told("sums"))["sums"]

    async def all_free(self) -> bool:
        state = await self.decode.ask("state")
        return state["free"] == state["total"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(params=["tcp", "tls"])
async def hosts(request, nursery, ours, tmp_path) -> AsyncIterator[Hosts]:
    settings = {
        "link": request.param,
        "certificates": str(ours),
        "socket_dir": str(tmp_path),
        "head_dim": 4096,
        "blocks": 20,
        "lease_ms": int(LEASE_S * 1000),
        "connect_ms": int(CONNECT_S * 1000),
        "reply_ms": int(REPLY_S * 1000),
    }
    async with asyncio.timeout(DEADLINE_S):
        with two_hosts() as wire:
            ends = {}
            for role, host in (("prefill", wire.prefill), ("decode", wire.decode)):
                there = {"netns": host.netns, "host": host.address}
                ends[role] = await nursery.fork(role, role, **there, **settings)
            made = Hosts(wire, ends["prefill"], ends["decode"])
            try:
                yield made
                assert await made.all_free()
            finally:
                await made.prefill.kill()
                await made.decode.kill()


async def test_blocks_go_from_one_host_to_the_other(hosts):
    for _ in range(2):
        await hosts.hand_over()


async def test_a_wire_cut_in_the_middle_of_a_push_ends_it_on_both_sides(hosts):
    reserved = await hosts.reserve()
    await hosts.decode.ask("stop_at", index=PIECES[0])
    running = asyncio.ensure_future(hosts.transfer(reserved["ticket"]))
    await hosts.decode.told("in a push")
    await hosts.decode.has_stopped()  # so the push stands in its middle
    hosts.wire.down()
    hosts.decode.go_on()
    async with asyncio.timeout(REPLY_S + SLACK_S):
        settled = await hosts.decode.ask("settled", transfer=reserved["transfer"])
    assert settled["ending"].startswith("lost"), settled
    async with asyncio.timeout(REPLY_S + SLACK_S):
        said = await running
    assert said["ending"].startswith("failed"), said
    assert said["waits_s"]["push"] <= REPLY_S + SLACK_S, said
    assert await hosts.all_free()

    hosts.wire.up()
    async with asyncio.timeout(REPLY_S + CONNECT_S + SLACK_S):
        await hosts.prefill.ask("unlinked")  # D has ended the link; P hears of it now
    await hosts.hand_over()


async def test_a_wire_cut_between_pushes_ends_the_transfer(hosts):
    reserved = await hosts.reserve()
    running = asyncio.ensure_future(hosts.transfer(reserved["ticket"], pause="between"))
    await hosts.prefill.told("at", phase="between")
    hosts.wire.down()
    hosts.prefill.tell("go")
    said = await running
    assert said["ending"].startswith("failed"), said
    assert max(said["waits_s"].values()) <= REPLY_S + CONNECT_S + SLACK_S, said
    # D has heard nothing: its lease ends, and Abort is not answered.
    async with asyncio.timeout(LEASE_S + REPLY_S + SLACK_S):
        await hosts.decode.ask("settled", transfer=reserved["transfer"])

    hosts.wire.up()
    async with asyncio.timeout(REPLY_S + CONNECT_S + SLACK_S):
        await hosts.prefill.ask("unlinked")  # D has ended the link; P hears of it now
    await hosts.hand_over()


async def test_a_host_out_of_reach_costs_the_deadline_of_a_connection(hosts):
    reserved = await hosts.reserve()
    hosts.wire.down()
    said = await hosts.transfer(reserved["ticket"])
    assert said["ending"].startswith("failed"), said
    assert said["waits_s"]["begin"] <= CONNECT_S + SLACK_S

    hosts.wire.up()
    said = await hosts.transfer(reserved["ticket"])
    assert said["ending"] == "committed", said
    await hosts.decode.ask("finish", transfer=reserved["transfer"])
