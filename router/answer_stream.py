"""Owns the way from an answer's tokens to the messages its client sees: Deltas, then Finished.

Pure. Made once per request by router/frontdoor.py.
"""

from kvrelay.wire import inference_pb2
from kvrelay.wire.inference_pb2 import Delta
from router.detokenize import Detokenizer, TextStream
from router.request import Ending, Request, Times


class AnswerStream:
    """Turns the tokens of one answer into what its client sees.

    The text that goes with the first n tokens follows from those tokens alone, however they were
    grouped. So of an answer that goes on here, all tokens pass and the client gets what comes after
    those that it has: `first` of them.
    """

    def __init__(self, request: Request, detokenizer: Detokenizer, first: int = 0) -> None:
        self.finished: inference_pb2.Finished | None = None
        self._request = request
        self._text = TextStream(detokenizer, request.sampling.stop)
        self._offset = 0
        self._first = first

    def on(self, event: list[int] | Ending) -> Delta | None:
        """The next Delta, if there is anything to show. Sets `finished` at the end."""
        if self._offset < self._first and isinstance(event, list):
            known = self._first - self._offset
            self._next(event[:known])
            event = event[known:]
            if not event or self.finished is not None:
                return None
        return self._next(event)

    def _next(self, event: list[int] | Ending) -> Delta | None:
        if isinstance(event, Ending):
            text = self._text.finish()
            self._finish(Ending.STOP_STRING if self._text.stopped else event)
            return Delta(offset=self._offset, text=text) if text else None
        shown, text = self._show(event)
        delta = Delta(offset=self._offset, token_ids=event[:shown], text=text)
        self._offset += shown
        if self._text.stopped:
            self._finish(Ending.STOP_STRING)
        return delta

    def _show(self, tokens: list[int]) -> tuple[int, str]:
        """How many of the tokens are shown, and the text that comes of them."""
        sampling = self._request.sampling
        if not sampling.stop:
            return len(tokens), self._text.push(
                [t for t in tokens if t not in sampling.eos_token_ids]
            )
        text = ""
        for shown, token in enumerate(tokens, start=1):
            may_stop = self._offset + shown > sampling.min_tokens
            if token not in sampling.eos_token_ids:
                text += self._text.push([token], may_stop=may_stop)
            if self._text.stopped:
                return shown, text
        return len(tokens), text

    def _finish(self, ending: Ending) -> None:
        length = inference_pb2.FINISH_REASON_LENGTH
        stop = inference_pb2.FINISH_REASON_STOP
        self.finished = inference_pb2.Finished(
            reason=length if ending is Ending.LENGTH else stop,
            prompt_tokens=len(self._request.prompt),
            cached_tokens=self._request.times.cached_tokens,
            completion_tokens=self._offset,
            timings=_timings(self._request.times, self._offset),
        )


def _timings(times: Times, tokens: int) -> inference_pb2.Timings:
    first = times.first_token_at_ms or times.arrived_at_ms
    last = times.last_token_at_ms or first
    began = times.prefill_began_at_ms or first
    return inference_pb2.Timings(
        queue_ms=began - times.arrived_at_ms,
        prefill_ms=times.prefill_ms,
        ttft_ms=first - times.arrived_at_ms,
        tpot_ms=(last - first) / (tokens - 1) if tokens > 1 else 0.0,
        kv_bytes=times.kv_bytes,
        kv_transfer_ms=times.kv_transfer_ms,
        kv_exposed_ms=times.kv_exposed_ms,
        transport=times.transport,
    )
