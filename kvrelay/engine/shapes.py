"""The shapes of packed weights, and of a model that runs fused. Light to import.

Weights are stored in panels of 32 outputs (kernels/tiles.py has the format): float32, or int8 in
groups of 64 inputs with a scale for each output and group.
"""

from dataclasses import dataclass

LINE_BYTES = 64  # one cache line, one vector
PANEL = 32
PANEL_BYTES = PANEL * 4  # of one row of a panel of floats
GROUP = 64
GROUP_BYTES = GROUP * PANEL + PANEL_BYTES
GROUP_SCALE_BYTES = 8  # of a row's group: float32 scale, int32 correction


def up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class PackedShape:
    """A layer `[outputs, inputs]` as it is stored."""

    outputs: int
    inputs: int
    int8: bool

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def groups(self) -> int:
        return -(-self.inputs // GROUP) if self.int8 else 0

    @property
    def panel_bytes(self) -> int:
        return self.groups * GROUP_BYTES if self.int8 else self.inputs * PANEL_BYTES

    @property
    def size_bytes(self) -> int:
        return self.panels * self.panel_bytes


@dataclass(frozen=True)
class FusedShape:
    """A model of the Llama shape. `windows`: of each layer, 0 for none."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    epsilon: float
    scale: float
    rope_scale: float
    windows: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool
    int8: bool

    @property
    def q_width(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def arrays(self) -> int:
        """Of packed weights, in all."""
        return 4 + self.layers * (7 + self.qkv_bias + 2 * self.qk_norm)

    def linears(self) -> list[PackedShape]:
        """Of one layer, then of the head."""
        sizes = (
            (self.qkv_width, self.hidden),
            (self.hidden, self.q_width),
            (self.inner, self.hidden),
            (self.inner, self.hidden),
            (self.hidden, self.inner),
            (self.vocab, self.hidden),
        )
        return [PackedShape(outputs, inputs, self.int8) for outputs, inputs in sizes]
