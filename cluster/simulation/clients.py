"""Simulated clients: they ask, read, lose their router and ask another, cancel, and compare.

Every token is compared with the reference as it is seen. A client that loses its router asks any
to resume; when nobody has its answer it asks the same again and skips what it has, as
kvrelay/client.py does.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from cluster.simulation.loop import ProcessLoop
from cluster.simulation.model import answer_to
from cluster.simulation.processes import SimProcess, Surroundings
from cluster.simulation.routers import Refused, SimRouter
from cluster.simulation.settings import Arrival

_ASK_AGAIN_S = 0.2
_ASKS_MAX = 60  # of one request, at routers that it lost or did not find


class Client:
    """One request, from its arrival until it has ended in one way or another."""

    def __init__(self, arrival: Arrival, violated: Callable[[str], None]) -> None:
        self.ask = arrival.ask
        self.arrival = arrival
        self.outcome = ""  # none yet
        self.kept_at = ""  # the decode worker of its newest tokens
        self.may_resume = False  # it has lost a router that may have begun
        self.asks = 0  # calls that have reached a router
        self.asked_anew = False  # nobody had kept its answer
        self.seen: list[int] = []
        self._right = answer_to(arrival.ask)
        self._violated = violated

    def tokens(self, offset: int, tokens: Sequence[int]) -> None:
        """Of the present stream, which begins at token 0: those that were seen come again."""
        name, right = self.ask.request_id, self._right[offset : offset + len(tokens)]
        if offset > len(self.seen):
            self._violated(f"client {name}: token {offset} after {len(self.seen)}: a gap")
        elif list(tokens) != right:
            self._violated(f"client {name}: {list(tokens)} at {offset}, the reference has {right}")
        self.seen += tokens[len(self.seen) - offset :]

    def finished(self, ending: str) -> None:
        self.outcome = "finished"
        if len(self.seen) != len(self._right):
            self._violated(
                f"client {self.ask.request_id}: {ending} after {len(self.seen)} tokens of "
                f"{len(self._right)}"
            )

    def refused(self, refused: Refused, wrong: str) -> None:
        """wrong: why it should not have been."""
        self.outcome = refused.kind
        if wrong:
            self._violated(
                f"client {self.ask.request_id}: refused after {len(self.seen)} tokens, {wrong}: "
                f"{refused}"
            )

    def not_served(self) -> None:
        self.outcome = "no router"
        self._violated(f"client {self.ask.request_id}: no router took it in {_ASKS_MAX} calls")

    @property
    def wants_no_more(self) -> bool:
        limit = self.arrival.cancel_after
        return limit is not None and len(self.seen) >= limit


class _AskAgainError(Exception):
    """Nobody has kept the answer."""


def _wish(client: Client) -> tuple[Any, ...]:
    ask = client.ask
    if client.may_resume:
        return "resume", (ask.tenant, ask.request_id), len(client.seen), client.kept_at
    return "ask", ask


class SimClients(SimProcess):
    """All clients, in one process that no fault meets. judge: says what is wrong with a refusal."""

    role = "clients"

    def __init__(
        self,
        name: str,
        loop: ProcessLoop,
        around: Surroundings,
        arrivals: Sequence[Arrival],
        routers: Callable[[], list[SimRouter]],
        rng: Random,
        judge: Callable[[Client, Refused], str],
    ) -> None:
        super().__init__(name, loop, around)
        self.clients = [Client(arrival, self.violated) for arrival in arrivals]
        self._routers = routers
        self._rng = rng
        self._judge = judge
        for client in self.clients:
            loop.spawn(self._live(client))

    @property
    def waiting(self) -> list[Client]:
        return [client for client in self.clients if not client.outcome]

    async def _live(self, client: Client) -> None:
        await asyncio.sleep(client.arrival.at_s)
        try:
            async with asyncio.timeout(client.arrival.cancel_s):
                await self._served(client)
        except TimeoutError:
            client.outcome = "cancelled"

    async def _served(self, client: Client) -> None:
        for _ in range(_ASKS_MAX):
            try:
                await self._asked(client)
            except ConnectionError:
                client.may_resume = True
            if client.outcome:
                return
            await asyncio.sleep(_ASK_AGAIN_S)
        client.not_served()

    async def _asked(self, client: Client) -> None:
        """At one router, until the answer has ended or it has to be asked for again. Raises
        ConnectionError when the router is lost."""
        router = self._rng.choice(self._routers())
        end = await self._around.network.dial(self.place, router.address, "client")
        try:
            end.send(_wish(client))
            client.asks += 1
            while not client.outcome:
                if client.wants_no_more:
                    client.outcome = "cancelled"
                    return
                self._take(client, await end.receive())
        except _AskAgainError:
            return
        finally:
            end.close()

    def _take(self, client: Client, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "tokens":
            client.kept_at = rest[1]
            client.tokens(rest[0], rest[2:])
        elif kind == "finished":
            client.finished(rest[0])
        else:
            self._take_refusal(client, rest[0])

    def _take_refusal(self, client: Client, refused: Refused) -> None:
        if refused.kind == "NotKeptTrouble" and client.may_resume:
            client.may_resume = False
            client.asked_anew = True
            raise _AskAgainError
        if refused.kind in ("DuplicateRequestError", "TakenOverTrouble") and client.asks > 1:
            raise ConnectionResetError  # the router has not noticed yet that we had left
        client.refused(refused, self._judge(client, refused))
