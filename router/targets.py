"""What the operator's targets mean for a request that waits.

Pure functions, used by the queue and router/aims.py.
"""

from math import inf

from kvrelay.config import RouterConfig
from router.request import Request

_TTFT_SHARE = 0.95  # of the target for first tokens: the rest is for the way to the client


def any_targets(config: RouterConfig) -> bool:
    return bool(config.ttft_target_ms or config.tpot_target_ms)


def due_ms(request: Request, config: RouterConfig) -> float:
    """When its first token is due; inf when it has it, or nobody waits for it."""
    if request.times.first_token_at_ms is not None:
        return inf
    target_ms = config.ttft_target_ms
    at_ms = request.times.arrived_at_ms + _TTFT_SHARE * target_ms if target_ms else inf
    return min(at_ms, request.deadline_at_ms)


def waits_for_others_until_ms(request: Request, config: RouterConfig) -> float:
    """Late or not: after that it goes first."""
    return request.queued_at_ms + config.late_wait_ms
