"""Which call reads which request's answer, and which waits for one to go on with.

Kept by router/fleet.py. A request has one reader at a time: who resumes it takes it over.
"""

import asyncio
from collections.abc import Sequence

from router.answer import Answer, ReadingTurns
from router.commands import NotKeptTrouble, TakenOverTrouble, Trouble
from router.request import Ending, Request
from router.resumption import Resumption

Found = tuple[Request, Answer]


class Readers:
    def __init__(self) -> None:
        self._turns = ReadingTurns()
        self._answers: dict[Request, Answer] = {}
        self._waiting: dict[Resumption, asyncio.Future[Found]] = {}

    def open(self, request: Request) -> Answer:
        """With all that there is of it so far; whoever has read it until now is told to leave."""
        self.put(request, TakenOverTrouble())
        answer = self._answers[request] = Answer(self._turns)
        if request.answer:
            answer.put(request.answer)
        return answer

    def put(self, request: Request, event: Sequence[int] | Ending | Trouble) -> None:
        answer = self._answers.get(request)
        if answer is not None:
            answer.put(event)

    def close(self, request: Request, answer: Answer) -> bool:
        """Nobody reads this answer any more. False when another call reads the request by now."""
        if self._answers.get(request) is not answer:
            return False
        del self._answers[request]
        return True

    def wait(self, wish: Resumption) -> asyncio.Future[Found]:
        """Until `forget`, what is found for it goes there."""
        found = self._waiting[wish] = asyncio.get_running_loop().create_future()
        return found

    def forget(self, wish: Resumption) -> None:
        del self._waiting[wish]

    def found(self, wish: Resumption, request: Request) -> Answer | None:
        """The answer, if nobody waits for it any more: its client has gone in this very pass."""
        answer, waiting = self.open(request), self._waiting[wish]
        if waiting.done():
            return answer
        waiting.set_result((request, answer))
        return None

    def not_found(self, wish: Resumption, trouble: NotKeptTrouble) -> None:
        if not self._waiting[wish].done():
            self._waiting[wish].set_exception(trouble)

    def shut_down(self, trouble: Trouble) -> None:
        """Tells all of them."""
        for answer in self._answers.values():
            answer.put(trouble)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(trouble)
