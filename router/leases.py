"""Owns what the requests of one call hold of their key's quota: all of them get it, or none.

Made by the front door, over router/quotas.py.
"""

import contextlib
from collections.abc import Iterator, Sequence

from kvrelay.clock import now_ms
from router.callers import Caller
from router.quotas import BeyondQuotaError, Lease, Quotas
from router.request import Request


class RequestLease:
    """A lease, and the request whose tokens are reserved in it.

    before: tokens of the request that are no part of it.
    """

    def __init__(
        self, quotas: Quotas, lease: Lease, request: Request | None = None, before: int = 0
    ) -> None:
        self._quotas = quotas
        self._lease = lease
        self._request = request
        self._before = before
        self._moved = False

    def reserve(self, request: Request) -> None:
        """Raises QuotaExceededError or BeyondQuotaError."""
        tokens = len(request.prompt), request.sampling.max_tokens
        self._quotas.reserve(self._lease, *tokens, now_ms())
        self._request = request

    def move(self) -> "RequestLease":
        """What it holds, for another call with this request; it holds nothing itself any more."""
        self._moved = True
        return RequestLease(self._quotas, self._lease, self._request, self._before)

    def end(self) -> None:
        """Gives back what was not used; a second time changes nothing."""
        if self._moved:
            return
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


def of_begun(quotas: Quotas, caller: Caller, request: Request) -> RequestLease:
    """For what is left of a request that another router has begun. Never refused."""
    lease = quotas.go_on(caller.name, caller.quota, request.max_tokens_now, now_ms())
    return RequestLease(quotas, lease, request, request.prompt_tokens_now)


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


@contextlib.contextmanager
def looking(quotas: Quotas, caller: Caller) -> Iterator[None]:
    """While a request of another router is looked for; an exception means that it is not found.

    Raises:
        QuotaExceededError: not now.
    """
    quotas.look(caller.name, caller.quota, now_ms())
    found = False
    try:
        yield
        found = True
    finally:
        quotas.looked(caller.name, caller.quota, found=found)


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
