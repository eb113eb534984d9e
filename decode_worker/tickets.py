"""Signs the tickets of one decode worker, and knows them again.

Used by handoff.py. The key is made with the worker and never leaves it: a ticket is for the worker
that gave it, and worth nothing after its end.
"""

import hmac
import secrets

from kvrelay.transport.errors import RefusedError, Rejection
from kvrelay.wire.transfer_pb2 import Ticket

_KEY_BYTES = 32


class TicketSigner:
    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)

    def signature(self, ticket: Ticket) -> bytes:
        """Over every field but the signature, those that a newer peer may have added included.

        The bytes that protobuf makes of equal tickets are equal within one process, and this one
        both signs and checks.
        """
        unsigned = Ticket()
        unsigned.CopyFrom(ticket)
        unsigned.ClearField("signature")
        return hmac.digest(self._key, unsigned.SerializeToString(deterministic=True), "sha256")

    def check(self, ticket: Ticket, given: bytes) -> None:
        """Raises RefusedError unless we have signed the ticket, and nothing of it was changed.

        given: the signature of the ticket that was given for this transfer, if one was.
        """
        if hmac.compare_digest(self.signature(ticket), ticket.signature):
            return
        if given and hmac.compare_digest(given, ticket.signature):
            raise RefusedError(Rejection.ALTERED, "the ticket is not as it was given")
        raise RefusedError(Rejection.FORGED, "the ticket's signature is wrong")
