"""What the processes of `kvrelay bench router` must agree on: a token's id says when it was made.

So whoever reads a token knows how long it was on its way, without a word between the processes. All
of them run on one machine and read its one monotonic clock.
"""

import time

# Ids 0 to 255 are the bytes. A clock of so many ticks comes around once in 3.3 s.
VOCAB = 32_768
_TICKS_A_SECOND = 10_000


def stamp() -> int:
    """The id of a token that is made now."""
    return int(time.monotonic() * _TICKS_A_SECOND) % VOCAB


def late_ms(token_id: int) -> float:
    """How long ago a token was made; less than the clock's round."""
    return (stamp() - token_id) % VOCAB * 1000 / _TICKS_A_SECOND
