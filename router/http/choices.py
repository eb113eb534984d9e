"""Owns the serving of a call with several prompts and several answers to each.

Every choice is a request of its own. All are admitted at once, by the front door; those after a
prompt's first are submitted when the first has its first token: then they find the prompt cached.
Choices are numbered as OpenAI does: prompt by prompt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kvrelay.wire.inference_pb2 import Delta, Finished
from router.ask import Ask
from router.callers import Caller
from router.fleet import now_ms
from router.frontdoor import Admitted, FrontDoor
from router.served import Served

# Told of everything that comes, with the choice's number; what it awaits holds that choice up.
Take = Callable[[int, Served, Delta | Finished], Awaitable[None]]


async def serve_choices(door: FrontDoor, asks: Sequence[Ask], caller: Caller, take: Take) -> None:
    """Serves all answers to each ask; returns when all have ended.

    Whatever ends one with an error, a cancel included, takes all of them back from the workers.

    Raises:
        Refusal: of all, before any has begun; or of the first that is not served to its end.
    """
    async with door.admit(asks, caller) as choices:
        if len(choices) == 1:
            await _serve(door, 0, choices[0], take)
            return
        try:
            async with asyncio.TaskGroup() as group:
                first = 0
                for ask in asks:
                    numbers = range(first, first + ask.answers)
                    prompt = _Prompt(door, choices, numbers, take, group)
                    group.create_task(prompt.serve_first())
                    first += ask.answers
        except BaseExceptionGroup as several:
            raise _first(several) from None


class _Prompt:
    """The choices of one prompt."""

    def __init__(
        self,
        door: FrontDoor,
        choices: Sequence[Admitted],
        numbers: range,
        take: Take,
        group: asyncio.TaskGroup,
    ) -> None:
        """numbers: of its own among the `choices` of the call."""
        self._door = door
        self._choices = choices
        self._waiting = numbers[1:]
        self._first = numbers[0]
        self._take = take
        self._group = group

    async def serve_first(self) -> None:
        await _serve(self._door, self._first, self._choices[self._first], self._take_first)

    async def _take_first(self, number: int, served: Served, event: Delta | Finished) -> None:
        waiting, self._waiting = self._waiting, range(0)
        for later in waiting:
            choice = self._choices[later]
            # How long the first has taken is no part of what this one waits for.
            choice.request.times.arrived_at_ms = now_ms()
            self._group.create_task(_serve(self._door, later, choice, self._take))
        await self._take(number, served, event)


async def _serve(door: FrontDoor, number: int, choice: Admitted, take: Take) -> None:
    async with door.submit(choice) as served:
        while (event := await served.next()) is not None:
            await take(number, served, event)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
