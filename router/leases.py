"""Owns what the requests of one call hold of their key's quota: all of them get it, or none.

Made by the front door, over router/quotas.py.
"""

import contextlib
from collections.abc import Iterator, Sequence

from router.callers import Caller
from router.fleet import now_ms
from router.quotas import BeyondQuotaError, Lease, Quotas
from router.request import Request


class RequestLease:
    """A lease, and the request whose tokens are reserved in it."""

    def __init__(self, quotas: Quotas, lease: Lease) -> None:
        self._quotas = quotas
        self._lease = lease
        self._request: Request | None = None
        self._before = 0  # tokens of the request that were there when it was charged

    def reserve(self, request: Request) -> None:
        """Raises QuotaExceededError or BeyondQuotaError."""
        tokens = len(request.prompt), request.sampling.max_tokens
        self._quotas.reserve(self._lease, *tokens, now_ms())
        self._request = request

    def charge(self, request: Request) -> None:
        """What is left of a request that another router has begun. Never refused: it was let in
        once, and must not be lost for want of quota."""
        self._before = request.prompt_tokens_now
        self._quotas.charge(self._lease, request.max_tokens_now)
        self._request = request

    def end(self) -> None:
        """Gives back what was not used; a second time changes nothing."""
        self._quotas.end(self._lease, self._used_tokens, now_ms())

    @property
    def _used_tokens(self) -> int:
        """A request that no worker has begun has used none."""
        request = self._request
        if request is None:
            return 0
        if self._before:
            return request.prompt_tokens_now - self._before
        return 0 if request.times.prefill_began_at_ms is None else request.prompt_tokens_now


@contextlib.contextmanager
def leased(quotas: Quotas, caller: Caller, count: int) -> Iterator[list[RequestLease]]:
    """The leases of `count` requests; whichever has not ended does with the context.

    Raises:
        QuotaExceededError: not now.
        BeyondQuotaError: never so many in one call.
    """
    leases = [
        RequestLease(quotas, lease)
        for lease in quotas.enter_all(caller.name, caller.quota, count, now_ms())
    ]
    try:
        yield leases
    finally:
        for lease in leases:
            lease.end()


def reserve_all(
    leases: Sequence[RequestLease], requests: Sequence[Request], caller: Caller
) -> None:
    """Raises QuotaExceededError or BeyondQuotaError."""
    wanted = sum(request.tokens_max for request in requests)
    quota = caller.quota
    limits = [n for n in (quota.tokens_per_minute, quota.kv_tokens_at_once) if n is not None]
    if len(requests) > 1 and limits and wanted > min(limits):
        raise BeyondQuotaError(
            f"{len(requests)} answers with prompts and max_tokens of {wanted} tokens together are "
            f"more than {min(limits)}, the quota of this API key: ask for fewer"
        )
    for lease, request in zip(leases, requests, strict=True):
        lease.reserve(request)
