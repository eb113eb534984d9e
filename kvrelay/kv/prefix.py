"""Names for the full blocks of a prompt, so that two requests can tell that they share a prefix.

A block's name is a hash of the block before it and of its own tokens; the chain begins at a root
that stands for the model, the block size and the tenant. So equal names mean equal KV, and no
tenant's blocks have a name that another tenant's prompt could have. The router names a prompt's
blocks once; decode workers go on with the chain over the answer. No torch: the router loads this.
"""

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

HASH_BYTES = 16
_SALT_BYTES = 32
_PERSON = b"kvrelay.prefix.1"  # whoever changes what is hashed changes this


def chain_root(model_fingerprint: str, block_size: int, salt: str) -> bytes:
    """Where the chains of one tenant's prompts begin; `salt` comes from who has been authenticated,
    never from what a request says."""
    key = hashlib.blake2b(salt.encode(), digest_size=_SALT_BYTES, person=_PERSON).digest()
    model = f"{block_size} {model_fingerprint}".encode()
    return hashlib.blake2b(model, digest_size=HASH_BYTES, key=key, person=_PERSON).digest()


class PrefixChain:
    """The names of a growing sequence's full blocks: `hashes`, first block first.

    `tail` is what comes after the last full block, fewer than block_size tokens.
    """

    def __init__(
        self,
        root: bytes,
        block_size: int,
        hashes: Iterable[bytes] = (),
        tail: Iterable[int] = (),
    ) -> None:
        self.root = root
        self.block_size = block_size
        self.hashes = list(hashes)
        self.tail = list(tail)

    def __len__(self) -> int:
        """Tokens."""
        return len(self.hashes) * self.block_size + len(self.tail)

    def extend(self, tokens: Sequence[int]) -> None:
        pending = array("I", [*self.tail, *tokens])
        parent = self.hashes[-1] if self.hashes else self.root
        full = len(pending) - len(pending) % self.block_size
        for start in range(0, full, self.block_size):
            block = pending[start : start + self.block_size].tobytes()
            parent = hashlib.blake2b(
                parent + block, digest_size=HASH_BYTES, person=_PERSON
            ).digest()
            self.hashes.append(parent)
        self.tail = pending[full:].tolist()


def join_hashes(hashes: Iterable[bytes]) -> bytes:
    """As they go over the wire."""
    return b"".join(hashes)


def split_hashes(data: bytes) -> list[bytes]:
    """Raises ValueError when `data` is not a whole number of hashes."""
    if len(data) % HASH_BYTES:
        raise ValueError(f"{len(data)} bytes of block hashes are no multiple of {HASH_BYTES}")
    return list(_split(len(data) // HASH_BYTES).unpack(data))


@lru_cache(maxsize=64)
def _split(hashes: int) -> struct.Struct:
    """Three times as fast as slices, and every block of every prompt comes by."""
    return struct.Struct(f"{HASH_BYTES}s" * hashes)
