"""Owns the serving of a call with several prompts and several answers to each.

Every choice is a request of its own at the front door. Those after a prompt's first are submitted
when the first has its first token: then they find the prompt cached. Choices are numbered as OpenAI
does: prompt by prompt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from kvrelay.wire.inference_pb2 import Delta, Finished
from router.callers import Caller
from router.frontdoor import Ask, FrontDoor, Served
from router.http.asks import next_choice
from router.refusals import Refusal

# Told of everything that comes, with the choice's number; what it awaits holds that choice up.
Take = Callable[[int, Served, Delta | Finished], Awaitable[None]]


async def serve_choices(
    door: FrontDoor, asks: Sequence[Ask], n: int, caller: Caller, take: Take
) -> None:
    """Serves n choices for each ask; returns when all have ended.

    Whatever ends one with an error, a cancel included, takes all of them back from the workers.

    Raises:
        Refusal: of the first choice that is not served, or not to its end.
    """
    if n == 1 and len(asks) == 1:
        async with door.serve(asks[0], caller) as served:
            while (event := await served.next()) is not None:
                await take(0, served, event)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for number, ask in enumerate(asks):
                prompt = _Prompt(door, ask, n, caller, take, group)
                group.create_task(_of_prompt(number, len(asks), prompt.serve_first(number * n)))
    except BaseExceptionGroup as several:
        raise _first(several) from None


class _Prompt:
    """The choices of one prompt."""

    def __init__(
        self,
        door: FrontDoor,
        ask: Ask,
        n: int,
        caller: Caller,
        take: Take,
        group: asyncio.TaskGroup,
    ) -> None:
        self._door = door
        self._ask = ask
        self._n = n
        self._caller = caller
        self._take = take
        self._group = group

    async def serve_first(self, number: int) -> None:
        waiting = range(1, self._n)
        async with self._door.serve(self._ask, self._caller) as served:
            while (event := await served.next()) is not None:
                for index in waiting:
                    ask = next_choice(self._ask, served.request, index)
                    self._group.create_task(self._serve(number + index, ask))
                waiting = range(0)
                await self._take(number, served, event)

    async def _serve(self, number: int, ask: Ask) -> None:
        async with self._door.serve(ask, self._caller) as served:
            while (event := await served.next()) is not None:
                await self._take(number, served, event)


async def _of_prompt(number: int, prompts: int, work: Coroutine[Any, Any, None]) -> None:
    """A refusal says which of several prompts it is about."""
    try:
        await work
    except Refusal as error:
        if prompts > 1:
            error.prompt = number
        raise


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
