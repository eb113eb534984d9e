"""The NCCL pairs of one worker, made on demand. Owned by the worker's end of the KV links.

P calls `invite`, sends the invitation over the control link, and calls `open` while D does; both
then `hold` the pair for a transfer. Whatever goes wrong raises NcclError, and the transfer goes
over tcp; so does one that comes while the pair is being opened, for nobody waits for a pair.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvrelay.transport.nccl_book import NcclLimits, PairBook
from kvrelay.transport.nccl_errors import NcclError
from kvrelay.transport.nccl_library import NcclLibrary
from kvrelay.transport.nccl_pair import NcclPair, PairState

T = TypeVar("T")


@dataclass(frozen=True)
class Invitation:
    """What D must know to open its end. Whoever has the id can join in D's place: it goes over
    the authenticated control link only."""

    epoch: int
    unique_id: bytes

    def __repr__(self) -> str:
        return f"Invitation(epoch={self.epoch})"


@dataclass(frozen=True)
class HeldPair:
    """A pair in use by one transfer. `pair` may fail at any time; release it all the same."""

    peer: str
    epoch: int
    pair: NcclPair


class NcclPairs:
    """`rank` is 0 on a prefill worker, 1 on a decode worker. Peers are named by instance id.

    `tell(peer, epoch, reason)` is called when a pair ends here, for the control link to pass on;
    the peer then calls `fail`. Without it the peer would find out at its next deadline.
    """

    def __init__(
        self,
        library: NcclLibrary,
        rank: int,
        device: int,
        limits: NcclLimits,
        tell: Callable[[str, int, str], None],
    ) -> None:
        self._library = library
        self._rank = rank
        self._device = device
        self._limits = limits
        self._tell = tell
        self._book = PairBook(limits)
        self._pairs: dict[str, HeldPair] = {}  # the newest of each peer, until it ends
        self._leaving: dict[NcclPair, asyncio.Task[None]] = {}  # until CLOSED
        self._calls_hung = 0
        self._ending = False

    @property
    def open_pairs(self) -> int:
        return self._book.open_pairs

    @property
    def hung(self) -> int:
        """Pairs that NCCL has not let go of, until it does, and calls that it did not answer."""
        return self._calls_hung + sum(pair.state is PairState.HUNG for pair in self._leaving)

    async def invite(self, peer: str) -> Invitation:
        """P only. Must be followed by `open` with the same invitation, or by `fail`."""
        self._check_not_ending()
        victim = self._book.begin(peer, self._now(), self.hung)
        epoch = self._book.epoch(peer)
        try:
            await self._make_room(victim)
            unique_id = await self._unique_id()
        except BaseException:
            self._book.ended(peer, epoch, self._now(), failed=True)
            raise
        return Invitation(epoch, unique_id)

    async def accept(self, peer: str, invitation: Invitation) -> None:
        """D only: like `open`, for an invitation that came. An older pair with that peer is ended:
        P would not have begun a new one if it were of use."""
        self._check_not_ending()
        older = self._pairs.get(peer)
        if older is not None and invitation.epoch > older.epoch:
            self.fail(peer, older.epoch, f"replaced by epoch {invitation.epoch}")
        victim = self._book.accept(peer, invitation.epoch, self._now(), self.hung)
        try:
            await self._make_room(victim)
        except BaseException:
            self._book.ended(peer, invitation.epoch, self._now(), failed=True)
            raise
        await self.open(peer, invitation)

    async def open(self, peer: str, invitation: Invitation) -> None:
        """Opens this end, and returns when both are open."""
        self._check_not_ending()
        epoch = invitation.epoch
        if not self._book.opening(peer, epoch):
            raise NcclError(f"the pair with {peer} of epoch {epoch} was given up")
        try:
            pair = NcclPair(
                self._library,
                invitation.unique_id,
                self._rank,
                self._device,
                abort_s=self._limits.abort_s,
                lost=lambda reason: self._lost(peer, epoch, reason),
            )
        except NcclError:
            self._book.ended(peer, epoch, self._now(), failed=True)
            raise
        self._pairs[peer] = HeldPair(peer, epoch, pair)
        try:
            await pair.opened(self._limits.open_s)
        finally:  # it may be open and the caller cancelled
            if self._book.opening(peer, epoch):
                self._book.opened(peer, epoch, self._now())

    def hold(self, peer: str) -> HeldPair | None:
        """The open pair with `peer`, for one transfer, or None; to be given to `release`."""
        return self._pairs[peer] if self._book.hold(peer, self._now()) else None

    def release(self, held: HeldPair) -> None:
        self._book.release(held.peer, held.epoch, self._now())

    def fail(self, peer: str, epoch: int, reason: str) -> None:
        """Ends a pair of which the peer said, or the control link shows, that it is of no more
        use. A pair of another epoch is not touched."""
        held = self._pairs.get(peer)
        if held is not None and held.epoch == epoch:
            held.pair.fail(reason)
        else:
            self._book.ended(peer, epoch, self._now(), failed=True)

    async def close(self) -> None:
        """Closes every pair; returns when each is CLOSED or HUNG."""
        self._ending = True
        async with asyncio.TaskGroup() as tasks:
            for peer in list(self._pairs):
                tasks.create_task(self._retire(peer, "the worker ends"))
        for task in list(self._leaving.values()):
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)

    async def _make_room(self, victim: str | None) -> None:
        if victim is not None:
            await self._retire(victim, "closed to make room for another pair")

    async def _retire(self, peer: str, reason: str) -> None:
        held = self._pairs.pop(peer, None)
        if held is None:
            return
        self._book.ended(peer, held.epoch, self._now(), failed=False)
        self._watch(held.pair)
        self._tell(peer, held.epoch, reason)
        await held.pair.close(self._limits.close_s)

    def _lost(self, peer: str, epoch: int, reason: str) -> None:
        """Called by a pair that fails, one that is being retired included."""
        held = self._pairs.get(peer)
        if held is None or held.epoch != epoch:
            return
        del self._pairs[peer]
        self._book.ended(peer, epoch, self._now(), failed=True)
        self._watch(held.pair)
        self._tell(peer, epoch, reason)

    def _watch(self, pair: NcclPair) -> None:
        task = asyncio.ensure_future(pair.wait_closed())
        self._leaving[pair] = task
        task.add_done_callback(lambda _: self._leaving.pop(pair, None))

    async def _unique_id(self) -> bytes:
        try:
            return await _on_own_thread(self._library.unique_id, self._limits.open_s)
        except TimeoutError:
            self._calls_hung += 1
            raise NcclError(f"NCCL gave no id within {self._limits.open_s:g} s") from None
        except RuntimeError as error:
            raise NcclError(f"no thread for NCCL: {error}") from error

    def _check_not_ending(self) -> None:
        if self._ending:
            raise NcclError("the worker ends")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _on_own_thread(call: Callable[[], T], deadline_s: float) -> T:
    """The result of a call that belongs to no pair; TimeoutError when it does not return in time,
    and its thread is left behind."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(set_it: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            set_it(value)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = (result.set_result, call())
        except Exception as error:
            outcome = (result.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=run, name="nccl-call", daemon=True).start()
    async with asyncio.timeout(deadline_s):
        return await result
