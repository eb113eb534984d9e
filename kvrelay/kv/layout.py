"""The shape of a KV block, and how many a token count needs.

Used by the pool that holds blocks, the transports that carry them and the handshake that refuses
to pair workers whose layouts differ. No torch: the router reads layouts too.
"""

from dataclasses import asdict, dataclass, replace
from math import prod

from kvrelay.wire import transfer_pb2

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
INT8 = "int8"
_LINE_BYTES = 64  # a cache line
_SCALE_BYTES = 4


@dataclass(frozen=True)
class KVLayout:
    """One block is one contiguous region `[layers, 2, block_size, kv_heads, head_dim]`.

    int8: `[layers, 2, side_bytes]`. A side (keys or values) is `[kv_heads, block_size, head_bytes]`
    bytes and then their scales, `[kv_heads, block_size]` float32; each begins at a cache line.
    """

    model_fingerprint: str
    dtype: str
    layers: int
    block_size: int
    kv_heads: int
    head_dim: int

    @property
    def block_shape(self) -> tuple[int, ...]:
        """In elements of the dtype."""
        if self.dtype == INT8:
            return (self.layers, 2, self.side_bytes)
        return (self.layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.block_shape) * DTYPE_BYTES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Of one head's keys at one position; in int8 whole cache lines."""
        if self.dtype == INT8:
            return _up_to_lines(self.head_dim)
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def vectors_bytes(self) -> int:
        """Of one side of one layer without its scales."""
        return self.block_size * self.kv_heads * self.head_bytes

    @property
    def side_bytes(self) -> int:
        """Of one layer's keys in a block; its values come next."""
        scales = self.block_size * self.kv_heads * _SCALE_BYTES if self.dtype == INT8 else 0
        return self.vectors_bytes + _up_to_lines(scales)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of `tokens` positions."""
        return blocks_for(tokens, self.block_size)

    def to_wire(self) -> transfer_pb2.KvLayout:
        return transfer_pb2.KvLayout(**asdict(self))

    @classmethod
    def from_wire(cls, message: transfer_pb2.KvLayout) -> "KVLayout":
        return cls(
            model_fingerprint=message.model_fingerprint,
            dtype=message.dtype,
            layers=message.layers,
            block_size=message.block_size,
            kv_heads=message.kv_heads,
            head_dim=message.head_dim,
        )

    def differences(self, other: "KVLayout") -> str:
        """Every field that differs, ours against theirs; empty when the layouts match."""
        ours, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{field}: {ours[field]} here, {theirs[field]} there"
            for field in ours
            if ours[field] != theirs[field]
        )

    def mismatch(self, other: "KVLayout") -> str:
        """What keeps two workers from being paired: every difference but that of dtypes we know,
        which the links convert; empty when they can be."""
        known = other.dtype in DTYPE_BYTES
        return self.differences(replace(other, dtype=self.dtype) if known else other)


def _up_to_lines(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold the KV of `tokens` positions."""
    return -(-tokens // block_size)


def reserved_blocks(prompt_tokens: int, max_tokens: int, block_size: int) -> int:
    """Blocks a decode worker reserves: the KV of the last answer token is never read."""
    return blocks_for(max(prompt_tokens, prompt_tokens + max_tokens - 1), block_size)
