"""What a request may expect of its wait: whether its first token can come in time.

Pure functions over the queue and the workers; called by the Dispatcher. Only what was measured
counts: nobody is turned away on a guess.
"""

from kvrelay.config import RouterConfig
from router.commands import DeadlineError
from router.prediction import NEUTRAL
from router.queue import WaitingQueue
from router.request import Request
from router.workers import Workers


def check_deadline(request: Request, queue: WaitingQueue, workers: Workers) -> None:
    """Notes how long its prompt will take at least.

    Raises:
        DeadlineError: those before it and the best placement make its first token late.
    """
    ttft_ms = each_ms = 0.0
    choice = workers.choosing.choose(request)
    if choice is not None:
        placement = choice.placement
        rates, alike = workers.computing(placement)
        if rates is not NEUTRAL:
            ttft_ms = placement.predicted_ttft_ms
            request.compute_ms = rates.base_ms + placement.tokens * rates.prompt_token_ms
            each_ms = request.compute_ms / alike
    ttft_ms += queue.wait_ms(request, each_ms)
    late_ms = ttft_ms - request.ttft_deadline_ms
    if late_ms > 0:
        due = f"due after {request.ttft_deadline_ms} ms"
        raise DeadlineError(f"its first token is predicted after {ttft_ms:.0f} ms, {due}", late_ms)


def wait_is_over(request: Request, now_ms: float, config: RouterConfig) -> str:
    """Why a queued request need not wait any longer; "" as long as it must."""
    if now_ms - request.queued_at_ms > config.queue_wait_ms:
        return f"no worker had room for it in {config.queue_wait_ms / 1000:g} s"
    if now_ms + request.compute_ms > request.deadline_at_ms:
        return f"no worker had room for it in time for {request.ttft_deadline_ms} ms"
    return ""
