"""What goes wrong on a KV link, and the reasons a decode worker counts."""

from enum import Enum


class Rejection(Enum):
    """Why something that came over a link was not accepted; `Listener.rejected` counts them."""

    HANDSHAKE = "handshake"  # version, model or shapes differ; no Hello; no certificate
    MALFORMED = "malformed"  # not a frame, or one that has no place there
    OVERSIZED = "oversized"  # a frame beyond its limit, or blocks beyond the ticket
    TRUNCATED = "truncated"  # the link ended inside a frame
    FORGED = "forged"  # a ticket that we did not sign, or none at all
    ALTERED = "altered"  # one that we signed, with something else in it
    EXPIRED = "expired"  # one whose time is over
    REPLAYED = "replayed"  # one that has been used
    STALE = "stale"  # of a transfer that has ended, or never was
    DUPLICATE = "duplicate"  # a block that has come, a transfer that has begun
    REORDERED = "reordered"  # blocks before their turn
    INCOMPLETE = "incomplete"  # a commit while blocks are missing
    CHECKSUM = "checksum"
    LATE = "late"  # blocks through a pair that has been closed meanwhile; they come again


class LinkError(Exception):
    """The link is of no more use: closed, broken, timed out, or the peer broke the protocol."""


class LinkTimeoutError(LinkError):
    """What had to come did not come in time."""


class PairGoneError(LinkError):
    """Blocks were to come through a pair that is not open here; the link is as good as before."""


class ProtocolError(LinkError):
    """The peer broke the protocol: the link ends."""

    def __init__(self, rejection: Rejection, message: str) -> None:
        super().__init__(message)
        self.rejection = rejection


class RefusedError(Exception):
    """The book does not allow what a writer asks; the text goes to the writer."""

    def __init__(self, rejection: Rejection, message: str) -> None:
        super().__init__(message)
        self.rejection = rejection
