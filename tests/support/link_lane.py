"""Plays plans on one P and one D, and says what must hold after every transfer, whatever was done
to it. See tests/transport/test_conformance.py."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from link_couple import CONTROL_S, NCCL_ABORT_S, SLACK_S, Couple
from link_plans import INTERRUPTIONS, WIRE_FAULTS, Plan
from link_process import End, EndDiedError
from link_proxy import Trick
from link_settings import REAP_EVERY_S
from link_tricks import pause_for, trick_for

_TRIES = 20  # of a transfer that the machine had no time for
_RESENDS_MAX = 2  # of one block, as the workers' config has it


@dataclass
class Tally:
    """What has happened, over all lanes."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)  # by fault and how it ended
    kills: int = 0
    stops: int = 0
    over_nccl: int = 0  # pushes
    late: int = 0  # transfers without a fault that a deadline ended all the same; played again


class Lane:
    """A couple that plays one plan after the other."""

    def __init__(self, ends: Couple, tally: Tally) -> None:
        self.ends = ends
        self._tally = tally

    async def play(self, plan: Plan) -> None:
        """Raises AssertionError when anything does not hold."""
        for _ in range(_TRIES):
            if not (await self._play_once(plan)).late:
                return
            self._tally.late += 1
        raise AssertionError("no time for one transfer: the machine is too busy")

    async def _play_once(self, plan: Plan) -> "_Transfer":
        self.ends.prefill.forget_events()
        self.ends.prefill.was_stopped = False
        if plan.fresh:
            await self.ends.unlink()
        transfer = await self._reserve(plan, sum(plan.pieces))
        if plan.fault == "stale":
            await self._play_stale(transfer)
        else:
            await self._play(transfer)
        if (plan.instead_of or plan.fault) in (*WIRE_FAULTS, "kill", "stop", "stall", "stale"):
            await self.ends.unlink()
        if plan.instead_of == "kill":
            await self.ends.end(self._victim(plan))
        await self._check_all_free(transfer)
        self._tally.endings[plan.fault, transfer.outcome.split(":")[0]] += 1
        return transfer

    async def _reserve(self, plan: Plan, count: int) -> "_Transfer":
        began_s, late_s = time.monotonic(), self.ends.witness.late_s  # before its lease begins
        asked = self.ends.decode.ask("reserve", count=count, at=self.ends.proxy_endpoint)
        reserved = await self.ends.within(asked, CONTROL_S, "reserve")
        return _Transfer(plan, reserved["transfer"], reserved["ticket"], began_s, late_s)

    # ---- one transfer

    async def _play(self, transfer: "_Transfer") -> None:
        plan = transfer.plan
        victim = self._victim(plan)
        trick = trick_for(plan, self.ends.link)
        self.ends.proxy.arm(trick)
        if plan.fault == "flip" and self.ends.link == "shm":
            index = plan.skip % sum(plan.pieces)
            await self.ends.decode.ask("flip", transfer=transfer.id, index=index, times=plan.times)
        if plan.phase == "before begin" and plan.fault in ("kill", "stop", "cancel"):
            await self._act(transfer, victim)
            transfer.acted = True
        beside = None
        if plan.fault not in INTERRUPTIONS:
            beside = await self._begin_beside(plan)
        running = asyncio.ensure_future(self._transfer(transfer))
        try:
            if plan.fault in INTERRUPTIONS:
                trick = await self._reach(plan, running, trick)
                if plan.fault in ("give_up", "cancel"):
                    beside = await self._begin_beside(plan)
                # What its worker or D's does must come in time to count.
                late = running.done() and plan.fault in ("give_up", "cancel")
                if plan.phase != "before begin" and not late:
                    await self._act(transfer, victim)
                    transfer.acted = True
                self._let_go_on(plan, trick)
            await self._settle(transfer, running, victim, trick)
            if beside is not None:
                await self._settle_beside(plan, *beside)
        finally:
            self.ends.proxy.arm(None)
            if trick is not None:
                trick.release.set()
            works = [running] if beside is None else [running, beside[1]]
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _begin_beside(
        self, plan: Plan
    ) -> "tuple[_Transfer, asyncio.Future[dict[str, Any]]] | None":
        """Another transfer on the same link."""
        if not plan.beside:
            return None
        beside = await self._reserve(plan, plan.beside)
        work = self.ends.prefill.ask(
            "beside", ticket=beside.ticket, pieces=[plan.beside], content=plan.content + 1
        )
        return beside, asyncio.ensure_future(work)

    async def _settle_beside(
        self, plan: Plan, beside: "_Transfer", running: "asyncio.Future[dict[str, Any]]"
    ) -> None:
        """It is disturbed by what breaks the link, and by nothing else."""
        said = await self.ends.within(running, self._prefill_s, "P's end of the one beside")
        settled = await self.ends.within(self._settled(beside), self._decode_s, "D's end of it")
        committed = settled["ending"] == "committed"
        if committed:
            await self._check_sums(beside, said["sums"])
        else:
            assert said["ending"] != "committed", (said, settled)
            beside.outcome = said["ending"]
            if plan.fault not in WIRE_FAULTS or (self.ends.link == "shm" and plan.fault == "flip"):
                self._check_in_time(beside, settled)

    async def _transfer(self, transfer: "_Transfer") -> dict[str, Any] | None:
        """P's part of it; None when P dies."""
        plan = transfer.plan
        held = plan.fault in INTERRUPTIONS and plan.phase == "in a push" and plan.fault != "stall"
        nccl_flips = plan.times if plan.fault == "flip" and self.ends.link == "nccl" else 0
        with contextlib.suppress(EndDiedError):
            return await self.ends.prefill.ask(
                "transfer",
                ticket=transfer.ticket,
                pieces=plan.pieces,
                content=plan.content,
                pause=pause_for(plan, self.ends.link),
                hold=plan.skip % len(plan.pieces) if held else -1,
                flips=nccl_flips,
                paired=plan.paired and self.ends.link == "nccl",
            )
        return None

    async def _reach(
        self, plan: Plan, running: "asyncio.Future[Any]", trick: Trick | None
    ) -> Trick | None:
        """Returns when the transfer is where the plan wants it, or has ended."""
        prefill = self.ends.prefill
        if self.ends.link == "tls" and plan.phase in ("in a push", "after commit"):
            into = plan.phase == "in a push"
            phase, toward = ("begun", "decode") if into else ("committing", "prefill")
            await self._first(running, prefill.told("at", phase=phase))
            trick = Trick("hold", toward, at=plan.at)
            self.ends.proxy.arm(trick)
            prefill.tell("go")
        if trick is not None:
            await self._first(running, trick.done.wait())
        elif plan.phase == "in a push":
            await self._first(running, prefill.told("held"))
        elif plan.phase in ("after begin", "between pushes", "before commit"):
            phase = {"after begin": "begun", "between pushes": "between"}.get(plan.phase, "pushed")
            await self._first(running, prefill.told("at", phase=phase))
        elif plan.phase != "before begin":
            await self.ends.within(asyncio.wait({running}), self._prefill_s, "the transfer")
        return trick

    async def _first(self, running: "asyncio.Future[Any]", other: Awaitable[Any]) -> None:
        waiting = asyncio.ensure_future(other)
        waits = asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        try:
            await self.ends.within(waits, self._prefill_s, "a phase of the transfer")
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _act(self, transfer: "_Transfer", victim: End) -> None:
        fault = transfer.plan.fault
        if fault == "kill":
            await victim.kill()
            self._tally.kills += 1
        elif fault == "stop":
            victim.stop()
            self._tally.stops += 1
        elif fault == "give_up":
            self.ends.prefill.tell("go", give_up=True)
        elif fault == "cancel":
            await self.ends.within(
                self.ends.decode.ask("cancel", transfer=transfer.id), CONTROL_S, "cancel"
            )

    def _let_go_on(self, plan: Plan, trick: Trick | None) -> None:
        if trick is not None and plan.fault != "stall":
            trick.release.set()
        self.ends.prefill.tell("open_gate")
        if plan.fault != "give_up":
            self.ends.prefill.tell("go")

    async def _settle(
        self,
        transfer: "_Transfer",
        running: "asyncio.Future[dict[str, Any] | None]",
        victim: End,
        trick: Trick | None,
    ) -> None:
        """Waits until each end has ended the transfer, each within its deadlines."""
        plan = transfer.plan
        if plan.fault == "stop" and victim is self.ends.prefill:
            await self._given_up(transfer)
            victim.go_on()
        said = await self.ends.within(running, self._prefill_s, "P's end of the transfer")
        if said is not None:
            transfer.outcome = said["ending"]
            self._check_waits(transfer, said["waits_s"])
            self._tally.over_nccl += said["carried"].count("nccl")
        if plan.fault == "stop" and victim is self.ends.decode:
            victim.go_on()
        if plan.fault == "stall":
            await self._given_up(transfer)
            if trick is not None:
                trick.release.set()
        ending = None
        if self.ends.decode.alive:
            said = await self.ends.within(self._settled(transfer), self._decode_s, "D's end")
            ending = said["ending"]
        await self._check_outcome(transfer, ending)

    async def _settled(self, transfer: "_Transfer") -> dict[str, Any]:
        return await self.ends.decode.ask("settled", transfer=transfer.id)

    async def _given_up(self, transfer: "_Transfer") -> None:
        """While P or the wire stands still: D lets go of the transfer. Over shm the blocks stay in
        quarantine, for P may yet write."""
        settled = asyncio.ensure_future(self._settled(transfer))
        told = asyncio.ensure_future(self.ends.decode.told("aborting", transfer=transfer.id))
        first = {settled, told} if self.ends.link == "shm" else {settled}
        waits = asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        try:
            await self.ends.within(waits, self._decode_s, "D's giving up")
            if not settled.done():
                await asyncio.sleep(self.ends.reply_s)  # of D's own: then it gives up on the writer
                state = await self.ends.decode.ask("state")
                assert settled.done() or state["quarantined"] >= sum(transfer.plan.pieces), state
        finally:
            settled.cancel()
            told.cancel()
            await asyncio.gather(settled, told, return_exceptions=True)

    async def _play_stale(self, transfer: "_Transfer") -> None:
        """A ticket that has had its time, one way or the other."""
        kind = transfer.plan.stale
        if kind == "restarted" and self.ends.lent:
            kind = "used"
        if kind == "expired":
            await self.ends.within(self._settled(transfer), self._decode_s, "the lease's end")
        elif kind == "cancelled":
            await self.ends.decode.ask("cancel", transfer=transfer.id)
        elif kind == "used":
            first = await self.ends.within(
                self._transfer(transfer), self._prefill_s, "the transfer"
            )
            assert first is not None
            if first["ending"] != "committed":  # else nothing is stale
                transfer.late = True
                self._check_in_time(transfer, first)
                # P may have given up before D heard of it: D holds the blocks to its lease's end.
                await self.ends.within(self._settled(transfer), self._decode_s, "D's end")
                return
        else:
            await self.ends.decode.kill()
            self._tally.kills += 1
            self.ends.decode = await self.ends.fork("decode")
        sums = (await self.ends.prefill.told("sums"))["sums"] if kind == "used" else []
        self.ends.prefill.forget_events()
        said = await self.ends.within(
            self._transfer(transfer), self._prefill_s, "the stale transfer"
        )
        assert said is not None
        assert said["ending"].startswith("failed"), said
        self._check_waits(transfer, said["waits_s"])
        assert not self.ends.prefill.has_told("at", phase="begun")
        if kind == "used":
            await self._check_sums(transfer, sums)
        transfer.outcome = said["ending"]

    # ---- what must hold

    async def _check_outcome(self, transfer: "_Transfer", ending: str | None) -> None:
        """ending: D's; None when it is dead."""
        committed = ending == "committed"
        plan = transfer.plan
        if committed:
            assert self.ends.prefill.has_told("at", phase="committing"), "accepted without a commit"
            sums = (await self.ends.prefill.told("sums"))["sums"]
            await self._check_sums(transfer, sums)
        if transfer.outcome == "committed":
            assert committed or not self.ends.decode.alive, f"P was told it was, D says {ending}"
            assert self.ends.prefill.has_told("at", phase="committing")
        mends = plan.fault == "flip" and self.ends.link == "shm" and plan.times <= _RESENDS_MAX
        if plan.fault in ("none", "calm") or mends:
            transfer.late = not committed
            if not committed:
                self._check_in_time(transfer, ending)
        if plan.fault == "flip" and self.ends.link == "shm" and plan.times > _RESENDS_MAX:
            assert not committed, "a block that was wrong too often was accepted"
        if plan.fault in ("give_up", "cancel") and transfer.acted:
            assert not committed, ending
        if not transfer.outcome:
            transfer.outcome = "died: " + str(ending)

    def _check_in_time(self, transfer: "_Transfer", ending: Any) -> None:
        """Nothing but a deadline may end what nobody disturbs."""
        in_time = time.monotonic() - transfer.began_s < self._shortest_s
        assert not in_time, (transfer.outcome, ending)

    async def _check_sums(self, transfer: "_Transfer", expected: list[str]) -> None:
        there = await self.ends.within(
            self.ends.decode.ask("finish", transfer=transfer.id), CONTROL_S, "finish"
        )
        assert there["sums"] == expected, "a committed block is not the source's"

    def _check_waits(self, transfer: "_Transfer", waits_s: dict[str, float]) -> None:
        if self.ends.prefill.was_stopped:
            return  # its clock went on
        nccl_s = self.ends.reply_s if self.ends.link == "nccl" else 0  # the socket's, then NCCL's
        limits = {
            "begin": self.ends.deadlines.connect_ms / 1000 + self.ends.reply_s,
            "push": self.ends.reply_s + nccl_s,
            "commit": self.ends.reply_s,
            "abort": self.ends.reply_s,
        }
        late_s = self.ends.witness.late_s - transfer.late_s
        for what, taken in waits_s.items():
            assert taken <= limits[what] + SLACK_S + late_s, (what, taken)

    async def _check_all_free(self, transfer: "_Transfer") -> None:
        """And brings back whom the plan killed."""
        if not self.ends.decode.alive:
            self.ends.decode = await self.ends.fork("decode")
        if not self.ends.prefill.alive:
            self.ends.prefill = await self.ends.fork("prefill")
        state = await self.ends.within(self.ends.decode.ask("state"), CONTROL_S, "state")
        assert transfer.id not in state["open"] or not self.ends.lent, state
        assert state["free"] + state["reserved"] == state["total"], state
        assert self.ends.lent or state["free"] == state["total"], state
        mine = await self.ends.within(self.ends.prefill.ask("state"), CONTROL_S, "state")
        assert mine["transfers"] == 0, mine
        assert mine["links"] <= 1, mine

    # ----

    def _victim(self, plan: Plan) -> End:
        return (
            self.ends.decode
            if plan.victim == "decode" and not self.ends.lent
            else self.ends.prefill
        )

    @property
    def _shortest_s(self) -> float:
        """Of its deadlines."""
        deadlines = self.ends.deadlines
        return min(deadlines.lease_ms, deadlines.connect_ms, deadlines.reply_ms) / 1000

    @property
    def _prefill_s(self) -> float:
        """All of P's deadlines of one transfer, one after the other."""
        return self.ends.deadlines.connect_ms / 1000 + 4 * self.ends.reply_s

    @property
    def _decode_s(self) -> float:
        """All of D's deadlines after the last sign of P."""
        nccl_s = self.ends.reply_s + NCCL_ABORT_S if self.ends.link == "nccl" else 0
        return self.ends.deadlines.lease_ms / 1000 + REAP_EVERY_S + self.ends.reply_s + nccl_s


@dataclass
class _Transfer:
    plan: Plan
    id: int
    ticket: str
    began_s: float
    late_s: float  # the witness's, then
    outcome: str = ""  # P's
    acted: bool = False  # what the plan wants was done to it under way
    late: bool = False  # a deadline ended what should have gone well: the machine is busy
