"""The decode worker's end of one KV link: takes blocks in and checks all that its writer says.

Made by listener.py for each connection. Which transfer may write which blocks is decided by the
TransferBook (decode_worker/handoff.py); this file carries its decisions over the socket. When a
link ends, every transfer it had begun has lost its writer, and the book is told so.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from kvrelay.transport.errors import PairGoneError, ProtocolError, RefusedError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.movers import Receiver
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Frame

log = logging.getLogger(__name__)


class TransferBook(Protocol):
    """Decides over transfers. Every method but `lost` raises RefusedError to refuse."""

    def begin(self, ticket: transfer_pb2.Ticket) -> None: ...

    def expect(
        self, transfer_id: int, first_index: int, count: int, *, again: bool
    ) -> Sequence[int]:
        """The pool blocks that these blocks of the ticket go to."""
        ...

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        """They are in the pool, but for the indexes in `bad`, which must come again."""
        ...

    def awaits_again(self, transfer_id: int) -> bool:
        """Whether blocks that were bad have not come again yet."""
        ...

    def commit(self, transfer_id: int, blocks: int, first_token_id: int) -> None: ...

    def lost(self, transfer_id: int, reason: str) -> None:
        """The writer will write no more, by its own word or because its link ended."""
        ...


class ReaderLink:
    """One writer's connection, once hands are shaken."""

    def __init__(
        self,
        peer: str,
        frames: FrameSocket,
        receiver: Receiver,
        book: TransferBook,
        links: "dict[int, ReaderLink]",
        rejected: Counter[Rejection],
    ) -> None:
        """links: by transfer, of the whole Listener; this link keeps its own there."""
        self.peer = peer
        self.transfers: set[int] = set()
        self.send = frames.send
        self._refused: set[int] = set()  # of those, the ones whose Aborted is still to come
        self._commits: dict[int, transfer_pb2.Commit] = {}  # that wait for blocks sent again
        self.proven = False  # that it holds tickets of ours
        self._frames = frames
        self._receiver = receiver
        self._book = book
        self._links = links
        self._rejected = rejected

    async def serve_one(self) -> None:
        """Serves one frame. What the book refuses ends that transfer; a peer that breaks the
        protocol loses the link."""
        frame = await self._frames.receive()
        kind = frame.WhichOneof("body")
        if kind == "begin":
            await self._begin(frame.begin)
        elif kind == "blocks":
            await self._receive(frame.blocks)
        elif kind == "commit":
            await self._commit(frame.commit)
        elif kind in ("abort", "aborted"):
            transfer_id = getattr(frame, kind).transfer_id
            self._end(transfer_id, frame.abort.reason or "the prefill worker let go")
        elif kind in ("pair_open", "pair_ended") and not self.proven:
            raise ProtocolError(Rejection.FORGED, f"{kind} before any ticket")
        else:
            await self._receiver.on_frame(frame)

    def give_up(self, transfer_id: int) -> None:
        """The writer should have said Aborted by now. Where this side is the one that writes, the
        link ends. On shm the writer may be stopped in the middle of a copy and go on one day, so
        its blocks stay in quarantine until it answers or dies."""
        if transfer_id not in self.transfers:
            return
        log.warning("%s does not answer Abort", self.peer)
        if not self._receiver.peer_writes:
            self._frames.close()

    async def let_writer_stop(self) -> None:
        """After an error, and before `close`, which gives the blocks back."""
        if self.transfers or not self._receiver.peer_writes:
            await self._receiver.quiet(self._frames)

    def close(self, reason: str) -> None:
        self._frames.close()
        for transfer_id in list(self.transfers):
            self._end(transfer_id, reason)

    def forget(self, transfer_id: int) -> None:
        """The transfer has been committed."""
        self.transfers.discard(transfer_id)

    async def _begin(self, begin: transfer_pb2.Begin) -> None:
        transfer_id = begin.ticket.transfer_id
        if transfer_id in self.transfers:
            raise ProtocolError(Rejection.DUPLICATE, "a second Begin of one transfer")
        try:
            self._book.begin(begin.ticket)
        except RefusedError as error:
            await self._refuse(transfer_id, error)
            return
        self.proven = True
        self.transfers.add(transfer_id)
        self._links[transfer_id] = self
        await self.send(Frame(begun=transfer_pb2.Begun(transfer_id=transfer_id)))

    async def _receive(self, header: transfer_pb2.Blocks) -> None:
        """Takes the bytes of blocks in, tells the book, asks again for those that are wrong."""
        transfer_id, first = header.transfer_id, header.first_index
        targets = self._targets(header)
        rejection = Rejection.CHECKSUM
        try:
            wrong = await self._receiver.receive(self._frames, header, targets)
        except PairGoneError as error:
            log.info("from %s: %s", self.peer, error)
            rejection, wrong = Rejection.LATE, list(range(len(targets)))
        bad = [first + position for position in wrong]
        if bad:
            self._rejected[rejection] += len(bad)
        refused = transfer_id in self._refused  # what was on the wire still comes, in order
        try:
            self._book.received(transfer_id, first, len(targets), bad)
        except RefusedError as error:
            if not refused:
                await self._refuse(transfer_id, error)
            return
        if refused:
            return
        if bad:
            log.warning("blocks %s from %s: %s, asking again", bad, self.peer, rejection.value)
            again = transfer_pb2.Resend(transfer_id=transfer_id, indexes=bad)
            await self.send(Frame(resend=again))
        elif transfer_id in self._commits:
            await self._commit(self._commits.pop(transfer_id))

    def _targets(self, header: transfer_pb2.Blocks) -> Sequence[int]:
        """A frame that names blocks it has no leave for ends the link: on tcp its bytes could
        go nowhere, on shm the writer has shown that it does not keep to what it was given."""
        if header.transfer_id not in self.transfers:
            text = f"blocks of transfer {header.transfer_id}, which this link has not"
            raise ProtocolError(Rejection.STALE, text)
        if self._receiver.wire.checksums and len(header.checksums) != header.count:
            text = f"{header.count} blocks with {len(header.checksums)} checksums"
            raise ProtocolError(Rejection.MALFORMED, text)
        try:
            return self._book.expect(
                header.transfer_id, header.first_index, header.count, again=header.again
            )
        except RefusedError as error:
            raise ProtocolError(error.rejection, str(error)) from error

    async def _commit(self, commit: transfer_pb2.Commit) -> None:
        transfer_id = commit.transfer_id
        if transfer_id in self._refused:
            return  # it crossed our Abort
        try:
            if transfer_id not in self.transfers:
                raise RefusedError(Rejection.STALE, "this link has no such transfer")
            if self._book.awaits_again(transfer_id):
                self._commits[transfer_id] = commit
            else:
                self._book.commit(transfer_id, commit.blocks, commit.first_token_id)
        except RefusedError as error:
            await self._refuse(transfer_id, error)

    async def _refuse(self, transfer_id: int, error: RefusedError) -> None:
        self._rejected[error.rejection] += 1
        if transfer_id in self.transfers:
            self._refused.add(transfer_id)
        abort = transfer_pb2.Abort(transfer_id=transfer_id, reason=str(error))
        await self.send(Frame(abort=abort))

    def _end(self, transfer_id: int, reason: str) -> None:
        if transfer_id in self.transfers:
            self.transfers.discard(transfer_id)
            self._refused.discard(transfer_id)
            self._commits.pop(transfer_id, None)
            del self._links[transfer_id]
            self._book.lost(transfer_id, reason)
