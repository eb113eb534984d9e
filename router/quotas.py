"""Owns what each API key may still use: its requests, its tokens, its part of the KV pools.

Pure: times are in ms of any one monotonic clock and passed in. The front door enters a request
before any work is done for it, reserves its tokens once they are counted, and ends it however it
ends. One Quotas counts for one router: behind n routers a key may use n times as much.
"""

import math
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

_MINUTE_MS = 60_000.0
_MOST = 2**53  # counted in floats


class Quota(BaseModel):
    """What one key may use; None: as much as there is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int | None = Field(default=None, ge=1, le=_MOST)
    requests_at_once: int | None = Field(default=None, ge=1, le=_MOST)
    # Prompt and max_tokens; what an answer has not used of max_tokens is given back at its end.
    tokens_per_minute: int | None = Field(default=None, ge=1, le=_MOST)
    # Prompt and max_tokens of all running requests together: what they hold of the KV pools.
    kv_tokens_at_once: int | None = Field(default=None, ge=1, le=_MOST)


UNLIMITED = Quota()


class QuotaExceededError(Exception):
    """Not now. retry_ms: when there is room again; None where it depends on running requests."""

    def __init__(self, message: str, retry_ms: int | None) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class BeyondQuotaError(Exception):
    """Never with this key: one request asks for more than its whole quota."""


@dataclass
class _Bucket:
    """Fills evenly, up to one minute's worth. `level` may be below 0 after its limit has shrunk.

    per_minute: the key's limit as the newest request found it. Those that run may have come under
    another: what they give back is counted by the one that is good now.
    """

    per_minute: int
    level: float
    at_ms: float

    def fill(self, now_ms: float) -> None:
        passed_ms = max(0.0, now_ms - self.at_ms)
        self.add(passed_ms * self.per_minute / _MINUTE_MS)
        self.at_ms = now_ms

    def add(self, amount: float) -> None:
        self.level = min(self.per_minute, self.level + amount)

    def ask(self, wanted: float, what: str) -> None:
        """Raises QuotaExceededError, unless it holds `wanted`."""
        missing_ms = math.ceil((wanted - self.level) * _MINUTE_MS / self.per_minute)
        if missing_ms > 0:
            raise QuotaExceededError(
                f"the quota of this API key, {self.per_minute} {what} a minute, is used up",
                missing_ms,
            )


@dataclass
class _Account:
    """What one key has used."""

    running: int = 0
    kv_tokens: int = 0
    looks: int = 0  # requests of other routers that are looked for now
    requests: _Bucket | None = None  # made, full, by the first request that has a limit
    misses: _Bucket | None = None  # the same, of those looked for in vain
    tokens: _Bucket | None = None


@dataclass
class Lease:
    """One request's part of its key's quota, from `enter` to `end`."""

    quota: Quota
    account: _Account = field(repr=False)
    tokens: int = 0  # reserved: prompt and max_tokens
    ended: bool = False


class Quotas:
    """looks_max: requests of one key that are looked for at once."""

    def __init__(self, looks_max: int = 64) -> None:
        self._looks_max = looks_max
        self._accounts: dict[str, _Account] = {}  # by the key's name; as many as there are keys

    def enter(self, name: str, quota: Quota, now_ms: float) -> Lease:
        """Counts one request. One that is refused is not counted, one that is let in always is.

        Raises:
            QuotaExceededError: too many run, too many have come, or the minute's tokens are used.
        """
        if quota == UNLIMITED:
            return Lease(quota, _Account())
        account = self._accounts.setdefault(name, _Account())
        if quota.requests_at_once is not None and account.running >= quota.requests_at_once:
            raise QuotaExceededError(
                f"{account.running} requests of this API key are running, its quota is "
                f"{quota.requests_at_once} at once",
                None,
            )
        if quota.tokens_per_minute is not None:  # before the work of counting this one's
            account.tokens = _filled(account.tokens, quota.tokens_per_minute, now_ms)
            account.tokens.ask(1, "tokens")
        if quota.requests_per_minute is not None:
            account.requests = _filled(account.requests, quota.requests_per_minute, now_ms)
            account.requests.ask(1, "requests")
            account.requests.level -= 1
        account.running += 1
        return Lease(quota, account)

    def enter_all(self, name: str, quota: Quota, count: int, now_ms: float) -> list[Lease]:
        """Counts the `count` requests of one call, or none of them.

        Raises:
            QuotaExceededError: as `enter`.
            BeyondQuotaError: never so many in one call.
        """
        for limit, when in (
            (quota.requests_at_once, "at once"),
            (quota.requests_per_minute, "a minute"),
        ):
            if limit is not None and count > limit:
                raise BeyondQuotaError(
                    f"{count} answers in one call are {count} requests, more than {limit} {when}, "
                    "the quota of this API key: ask for fewer"
                )
        leases: list[Lease] = []
        try:
            for _ in range(count):
                leases.append(self.enter(name, quota, now_ms))  # noqa: PERF401  # kept if one is refused
        except QuotaExceededError:
            for lease in leases:
                if lease.account.requests is not None:
                    lease.account.requests.level += 1
                self.end(lease, 0, now_ms)
            raise
        return leases

    def look(self, name: str, quota: Quota, now_ms: float) -> None:
        """Counts one request of another router that is looked for; `looked` ends it. What the key
        runs does not matter: one that is found was let in where it began.

        Raises:
            QuotaExceededError: too many are looked for, or too many have been in vain.
        """
        if quota == UNLIMITED:
            return
        account = self._accounts.setdefault(name, _Account())
        if account.looks >= self._looks_max:
            raise QuotaExceededError(
                f"{account.looks} requests of this API key are being looked for, the most at once",
                None,
            )
        if quota.requests_per_minute is not None:
            account.misses = _filled(account.misses, quota.requests_per_minute, now_ms)
            account.misses.ask(1, "requests")
        account.looks += 1

    def looked(self, name: str, quota: Quota, *, found: bool) -> None:
        if quota == UNLIMITED:
            return
        account = self._accounts[name]
        account.looks -= 1
        if not found and account.misses is not None:
            account.misses.level -= 1

    def go_on(self, name: str, quota: Quota, tokens: int, now_ms: float) -> Lease:
        """The lease of a request that has begun at another router, for the tokens left to come.
        Counted like any other, but never refused: it must not be lost for want of quota."""
        if quota == UNLIMITED:
            return Lease(quota, _Account())
        account = self._accounts.setdefault(name, _Account())
        account.running += 1
        account.kv_tokens += tokens
        if quota.tokens_per_minute is not None:
            account.tokens = _filled(account.tokens, quota.tokens_per_minute, now_ms)
            account.tokens.level -= tokens
        return Lease(quota, account, tokens)

    def reserve(self, lease: Lease, prompt_tokens: int, max_tokens: int, now_ms: float) -> None:
        """Takes the tokens that the request may use at most: so no number of requests at once
        can use more than the quota, whatever their answers turn out to be. Once a lease.

        Raises:
            QuotaExceededError: not now.
            BeyondQuotaError: never.
        """
        assert not lease.ended, "the lease has ended"
        assert not lease.tokens, "a second reserve"
        wanted, quota, account = prompt_tokens + max_tokens, lease.quota, lease.account
        limits = [n for n in (quota.tokens_per_minute, quota.kv_tokens_at_once) if n is not None]
        if limits and wanted > min(limits):
            raise BeyondQuotaError(
                f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} are more than "
                f"{min(limits)}, the quota of this API key: ask for fewer"
            )
        held = quota.kv_tokens_at_once
        if held is not None and account.kv_tokens + wanted > held:
            raise QuotaExceededError(
                f"running requests of this API key hold {account.kv_tokens} tokens, this one "
                f"needs {wanted}, its quota is {held} at once",
                None,
            )
        if quota.tokens_per_minute is not None:
            assert account.tokens is not None, "made by `enter`"
            account.tokens.fill(now_ms)
            account.tokens.ask(wanted, "tokens")
            account.tokens.level -= wanted
        account.kv_tokens += wanted
        lease.tokens = wanted

    def end(self, lease: Lease, used_tokens: int, now_ms: float) -> None:
        """used_tokens: of prompt and answer. What was reserved beyond them is given back; a second
        `end` changes nothing."""
        if lease.ended:
            return
        lease.ended = True
        account = lease.account
        account.running -= 1
        account.kv_tokens -= lease.tokens
        if lease.quota.tokens_per_minute is not None and account.tokens is not None:
            account.tokens.fill(now_ms)
            account.tokens.add(max(0, lease.tokens - used_tokens))


def _filled(bucket: _Bucket | None, per_minute: int, now_ms: float) -> _Bucket:
    """The bucket as it is now, with the limit that is good from now on."""
    if bucket is None:
        return _Bucket(per_minute, per_minute, now_ms)
    bucket.fill(now_ms)
    bucket.per_minute = per_minute
    bucket.add(0)
    return bucket
