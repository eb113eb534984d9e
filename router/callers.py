"""Who is calling, by the credentials that came with the call.

Both protocols ask `Callers` before anything else is done for a call. What a Caller may use, and
whose prefixes it shares, follows from it, never from what a client says of itself.
"""

import hashlib
import hmac
from dataclasses import dataclass, replace

from router.admission import DEFAULT_LIMITS
from router.keys import ApiKey, KeySet
from router.quotas import UNLIMITED, Quota
from router.refusals import Reason, Refusal

AUTHORIZATION_BYTES_MAX = 256  # of the header; a key has 77
_TENANT = "kvrelay tenant 1"


@dataclass(frozen=True)
class Caller:
    """name: for logs and metrics. tenant: salts the names of KV blocks; equal ones share them.
    priority_min: as urgent as this its requests may be. metrics: it may read all tenants' counts.
    """

    name: str
    tenant: str
    quota: Quota = UNLIMITED
    priority_min: int = 0
    metrics: bool = False


ANYBODY = Caller("anybody", "", priority_min=-DEFAULT_LIMITS.priority_max, metrics=True)


class Callers:
    """All who may call. Without keys that is anybody.

    cluster_key: makes the salt of a tenant, equal at every router of a cluster, one that nobody
    outside of it can work out from the tenant's name.
    """

    def __init__(self, keys: KeySet | None = None, cluster_key: str = "") -> None:
        self._keys: KeySet | None = None
        self._by_name: dict[str, Caller] = {}
        self._cluster_key = cluster_key.encode()
        self._anybody = replace(ANYBODY, tenant=self._salt(""))
        if keys is not None:
            self.replace(keys)

    @property
    def need_keys(self) -> bool:
        return self._keys is not None

    def replace(self, keys: KeySet) -> None:
        """From now on these keys are good. What runs with one that was removed goes on to its end:
        its answer is paid for, and who wants to end it at once restarts the router."""
        self._by_name = {key.name: self._caller(key) for key in keys}
        self._keys = keys

    def identify(self, authorization: str | None) -> Caller:
        """authorization: the header's value, "Bearer KEY".

        Raises:
            Refusal: UNAUTHENTICATED, for a key that is missing or wrong.
        """
        if self._keys is None:
            return self._anybody
        if not authorization:
            raise Refusal(
                Reason.UNAUTHENTICATED, "an API key is needed: send `authorization: Bearer KEY`"
            )
        scheme, _, key = authorization[:AUTHORIZATION_BYTES_MAX].partition(" ")
        entry = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if entry is None:
            raise Refusal(Reason.UNAUTHENTICATED, "the API key is wrong")
        return self._by_name[entry.name]

    def _caller(self, key: ApiKey) -> Caller:
        salt = self._salt(key.tenant_name)
        return Caller(key.name, salt, key.quota, key.priority_min, key.metrics)

    def _salt(self, tenant: str) -> str:
        message = f"{_TENANT}\0{tenant}".encode()
        return hmac.new(self._cluster_key, message, hashlib.sha256).hexdigest()
