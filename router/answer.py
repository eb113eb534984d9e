"""What of one answer has come from the workers and is not yet with its client.

Filled by router/fleet.py, read by router/frontdoor.py, both on the router's event loop. A reader
that is slower than the workers finds several tokens at once: a stream that is behind catches up in
one message, and no token is held back to wait for another.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from router.commands import Trouble
from router.request import Ending

# A message to a client takes some 50 us; so workers are read again after a fifth of a millisecond.
_READERS_A_PASS = 4


class ReadingTurns:
    """Who reads next, of the readers that have something to read: first come, first served.

    A step of a worker brings a token for hundreds of streams. If all went at once, nothing would be
    read from any worker until each had written its message: under load, steps and the answers to
    new requests would queue up in the sessions, where tokens cannot be put together. So a few go in
    each pass of the event loop; what comes meanwhile for those that still wait is in their next
    message.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = _READERS_A_PASS  # of this pass

    def wake(self, reader: "asyncio.Future[None]") -> None:
        if not self._left:
            self._waiting.append(reader)
            return
        reader.set_result(None)
        self._left -= 1
        if not self._left:
            asyncio.get_running_loop().call_soon(self._next_pass)

    def _next_pass(self) -> None:
        self._left = _READERS_A_PASS
        while self._waiting and self._left:
            reader = self._waiting.popleft()
            if not reader.done():  # else its client has gone
                self.wake(reader)


class Answer:
    """Tokens as they come, then how the answer ended.

    It has one reader, and never holds more than the answer.
    """

    def __init__(self, turns: ReadingTurns) -> None:
        self._turns = turns
        self._tokens: list[int] = []
        self._end: Ending | Trouble | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: Sequence[int] | Ending | Trouble) -> None:
        if isinstance(event, Ending | Trouble):
            self._end = event
        else:
            self._tokens += event
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            self._turns.wake(reader)

    async def next(self) -> list[int] | Ending:
        """All tokens that have come since the last call, at least one; after them the ending.

        Raises:
            Trouble: it cannot be finished.
        """
        reader = asyncio.get_running_loop().create_future()
        if self._tokens or self._end is not None:
            self._turns.wake(reader)
        else:
            self._reader = reader
        await reader
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return tokens
        assert self._end is not None, "woken for nothing"
        if isinstance(self._end, Trouble):
            raise self._end
        return self._end
