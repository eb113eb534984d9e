"""An accepted request and its answer, on the way to one client.

Made by router/frontdoor.py, read by the handlers of both protocols.
"""

import contextlib
from collections.abc import Iterator

from kvrelay.wire.inference_pb2 import Delta, Finished
from router.answer import Answer
from router.answer_stream import AnswerStream
from router.commands import Trouble
from router.detokenize import Detokenizer
from router.fleet import now_ms
from router.metrics import Metrics
from router.refusals import refusal
from router.request import Request


class Served:
    """first: the client has the tokens before this one, and their text."""

    def __init__(
        self,
        request: Request,
        answer: Answer,
        detokenizer: Detokenizer,
        metrics: Metrics,
        first: int = 0,
    ) -> None:
        self.request = request
        self._answer = answer
        self._stream = AnswerStream(request, detokenizer, first)
        self._metrics = metrics
        self._last_ms: float | None = None  # when the newest tokens left
        self._kept_at = ""  # as the client was told
        self._ended = False

    @property
    def finished(self) -> Finished | None:
        return self._stream.finished

    async def next(self) -> Delta | Finished | None:
        """What comes next; after Finished, None.

        Raises:
            Refusal: it cannot be finished.
        """
        while self._stream.finished is None:
            try:
                event = await self._answer.next()
            except Trouble:
                with refusals():  # here, not around: nearly all events are tokens
                    raise
            delta = self._stream.on(event)
            if delta is not None:
                if self.request.decode_id != self._kept_at:
                    self._kept_at = delta.kept_at = self.request.decode_id
                self._count(len(delta.token_ids))
                return delta
        if self._ended:
            return None
        self._ended = True
        return self._stream.finished

    def _count(self, tokens: int) -> None:
        if tokens:
            now, last = now_ms(), self._last_ms
            self._metrics.generated(tokens, None if last is None else now - last)
            self._last_ms = now


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever the client is to be told leaves as a Refusal."""
    try:
        yield
    except Exception as error:
        told = refusal(error)
        if told is None or told is error:
            raise
        raise told from error
