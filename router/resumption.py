"""One client's wish that this router goes on with an answer whose router it has lost.

Made by router/frontdoor.py; router/adoption.py finds who has the request.
"""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Resumption:
    request_id: str
    tenant: str  # the salt of who was authenticated
    kept_at: str  # the decode worker that the client was told; "": it was told none
    nonce: int  # that it was accepted with
    next_offset: int  # so many tokens of the answer the client has
    asked_at_ms: float
    known: int | None = None  # tokens of it where there are fewer than the client has
    asked: dict[int, str] = field(default_factory=dict)  # workers that have not answered, by key

    @property
    def name(self) -> tuple[str, str]:
        """That of the request."""
        return self.tenant, self.request_id
