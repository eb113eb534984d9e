"""The prefill worker's end of one KV link, shared by all its requests for one decode worker.

WriterPool (writer_pool.py) makes links and begins transfers on them; prefill_worker's service
pushes blocks through a Transfer. When the decode worker aborts a transfer, the writer answers
Aborted as soon as no write of that transfer is under way: that answer is what lets the decode
worker use the blocks again.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from kvrelay.transport.channel import to_end
from kvrelay.transport.errors import LinkError, LinkTimeoutError
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.movers import Sender
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Frame, Ticket

_TAIL_BYTES_MAX = 4 << 20  # of the last frame of a push


class Transfer:
    """One prompt's KV on its way. Ends with commit() or abort(); close() is safe at any time."""

    def __init__(self, link: "WriterLink", ticket: Ticket) -> None:
        self.ticket = ticket
        self.transport = link.sender.name  # what carried the last blocks
        self.blocks_sent = 0
        self.busy_s = 0.0
        self.committed = False
        self._link = link
        self._sources: list[int] = []  # blocks of our pool, for what must be sent again
        self._writing = asyncio.Lock()
        self._aborted: str | None = None
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def bytes_sent(self) -> int:
        return self.blocks_sent * self._link.sender.wire.layout.block_bytes

    async def push(self, source: Sequence[int]) -> None:
        """Sends the next len(source) blocks of the ticket out of these blocks of our pool.

        None at all is fine, too: any frame renews the decode worker's lease.

        Raises:
            LinkError: the link broke, or the decode worker gave the transfer up.
        """
        for count in self._link.frames_for(len(source)):
            await self._push_frame(source[:count])
            source = source[count:]

    async def _push_frame(self, source: Sequence[int]) -> None:
        first = self.blocks_sent
        target = self.ticket.block_ids[first : first + len(source)]
        header = transfer_pb2.Blocks(
            transfer_id=self.ticket.transfer_id, first_index=first, count=len(source)
        )
        async with self._writing:
            self._raise_if_aborted()
            started = time.perf_counter()
            self._sources.extend(source)  # first: the answer may come before the send returns
            await self._link.send_blocks(header, source, target)
            self.transport = self._link.sender.name
            self.busy_s += time.perf_counter() - started
            self.blocks_sent += len(source)

    def has_sent(self, indexes: Sequence[int]) -> bool:
        return all(index < len(self._sources) for index in indexes)

    async def send_again(self, indexes: Sequence[int]) -> None:
        """Called by the link: these blocks of the ticket did not arrive as they were sent."""
        for index in indexes:
            header = transfer_pb2.Blocks(
                transfer_id=self.ticket.transfer_id, first_index=index, count=1, again=True
            )
            target = self.ticket.block_ids[index : index + 1]
            async with self._writing:
                if self._aborted is None:
                    await self._link.send_blocks(header, self._sources[index : index + 1], target)

    async def commit(self, first_token_id: int, timeout_s: float) -> None:
        """Returns when the decode worker has checked and accepted every block.

        Raises:
            LinkError: it did not, or did not answer in time.
        """
        self._raise_if_aborted()
        frame = transfer_pb2.Commit(
            transfer_id=self.ticket.transfer_id,
            blocks=self.blocks_sent,
            first_token_id=first_token_id,
        )
        await self._link.send(Frame(commit=frame))
        await _answer_within(self.answer, timeout_s, "Commit")
        self.committed = True

    async def abort(self, reason: str) -> None:
        """Tells the decode worker that nothing more will be written."""
        async with self._writing:
            if self._aborted is None and not self._link.closed:
                self._aborted = reason
                frame = transfer_pb2.Abort(transfer_id=self.ticket.transfer_id, reason=reason)
                await self._link.send(Frame(abort=frame))

    async def aborted_by_peer(self, reason: str) -> None:
        """Called by the link: stops writing, then says so."""
        self.fail(LinkError(f"the decode worker gave up: {reason}"))
        async with self._writing:
            if self._aborted is None:
                self._aborted = reason
            frame = transfer_pb2.Aborted(transfer_id=self.ticket.transfer_id)
            await self._link.send(Frame(aborted=frame))

    def fail(self, error: LinkError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # whoever waits sees it; if nobody does, it is no news

    def close(self) -> None:
        self._link.forget(self.ticket.transfer_id)

    def _raise_if_aborted(self) -> None:
        if self._aborted is not None:
            raise LinkError(f"the decode worker gave up: {self._aborted}")


class WriterLink:
    """One connection to one decode worker; made by WriterPool."""

    def __init__(self, frames: FrameSocket, sender: Sender, push_bytes_max: int) -> None:
        self.sender = sender
        block_bytes = sender.wire.layout.block_bytes
        self._blocks_max = max(1, push_bytes_max // block_bytes)
        self._tail_blocks_max = max(1, _TAIL_BYTES_MAX // block_bytes)
        self.closed = False
        self._frames = frames
        self._transfers: dict[int, Transfer] = {}
        self._begun: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read())

    async def begin(self, ticket: Ticket, timeout_s: float) -> Transfer:
        """Asks leave to write; raises LinkError when it is refused or not given in time."""
        transfer_id = ticket.transfer_id
        if transfer_id in self._transfers:
            raise LinkError("the ticket has been used")
        transfer = Transfer(self, ticket)
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transfers[transfer_id], self._begun[transfer_id] = transfer, begun
        try:
            await self.send(Frame(begin=transfer_pb2.Begin(ticket=ticket)))
            await _answer_within(begun, timeout_s, "Begin")
        except BaseException:
            # Leave may have been given without our knowing: take it back.
            with contextlib.suppress(LinkError):
                await transfer.abort("gave up waiting for leave to write")
            self.forget(transfer_id)
            raise
        finally:
            self._begun.pop(transfer_id, None)
        return transfer

    def frames_for(self, count: int) -> list[int]:
        """How many of `count` blocks go in each frame: the decode worker checks one while the next
        is written, so the last is a small one."""
        frames = []
        while count > self._tail_blocks_max:
            frames.append(min(self._blocks_max, -(-count * 3 // 4)))
            count -= frames[-1]
        return [*frames, count] if count or not frames else frames

    async def send(self, frame: Frame) -> None:
        try:
            await self._frames.send(frame)
        except LinkError as error:
            self._lose(error)
            raise

    async def send_blocks(
        self, header: transfer_pb2.Blocks, source: Sequence[int], target: Sequence[int]
    ) -> None:
        """Returns only when nothing more is written for it, even when it is cancelled."""
        if self.closed:
            raise LinkError("the link is closed")
        try:
            await to_end(self.sender.send(self._frames, header, source, target))
        except LinkError as error:
            self._lose(error)
            raise

    def forget(self, transfer_id: int) -> None:
        self._transfers.pop(transfer_id, None)

    async def close(self) -> None:
        self._lose(LinkError("the link is closed"))
        await asyncio.gather(self._reader, *self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                await self._receive(await self._frames.receive())
        except LinkError as error:
            self._lose(error)

    async def _receive(self, frame: Frame) -> None:
        kind = frame.WhichOneof("body")
        if kind == "begun":
            begun = self._begun.get(frame.begun.transfer_id)
            if begun and not begun.done():
                begun.set_result(None)
        elif kind == "committed":
            transfer = self._transfers.get(frame.committed.transfer_id)
            if transfer and not transfer.answer.done():
                transfer.answer.set_result(None)
        elif kind == "resend":
            transfer = self._transfers.get(frame.resend.transfer_id)
            if transfer:
                if not transfer.has_sent(frame.resend.indexes):
                    raise LinkError("asked to send blocks again that were never sent")
                self._keep(_quietly(transfer.send_again(frame.resend.indexes)))
        elif kind == "abort":
            self._abort(frame.abort.transfer_id, frame.abort.reason)
        else:
            await self.sender.on_frame(frame)

    def _abort(self, transfer_id: int, reason: str) -> None:
        begun = self._begun.get(transfer_id)
        if begun and not begun.done():
            begun.set_exception(LinkError(f"leave to write was refused: {reason}"))
            begun.exception()  # as in Transfer.fail
        transfer = self._transfers.get(transfer_id)
        if transfer:
            answer = transfer.aborted_by_peer(reason)
        else:  # ours has ended already: nothing is being written
            frame = transfer_pb2.Aborted(transfer_id=transfer_id)
            answer = self.send(Frame(aborted=frame))
        self._keep(_quietly(answer))

    def _lose(self, error: LinkError) -> None:
        if self.closed:
            return
        self.closed = True
        self._keep(self._end())
        for waiting in list(self._begun.values()):
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # as in Transfer.fail
        for transfer in list(self._transfers.values()):
            transfer.fail(error)

    async def _end(self) -> None:
        await self.sender.close()
        self._reader.cancel()
        self._frames.close()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _answer_within(answer: asyncio.Future[None], timeout_s: float, what: str) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(answer)
    except TimeoutError:
        raise LinkTimeoutError(f"no answer to {what} within {timeout_s:g} s") from None


async def _quietly(answer: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(LinkError):
        await answer
