"""How a linear layer's weights are stored for the matrix kernel (kernels/tiles.py has the format).

packing.py packs weights, fused.py and generic.py compute with them.
"""

import numpy as np

from kvrelay.engine.kernels.tiles import LINEAR
from kvrelay.engine.shapes import GROUP, GROUP_BYTES, LINE_BYTES, PANEL, PackedShape, up_to

_INT8_MAX = 127
_ZERO_POINT = 128
_SCALE_MIN = 1e-30


def linear_record(shape: PackedShape, address: int) -> np.ndarray:
    """What tiles.linear takes, for weights at `address` (a multiple of 64)."""
    assert address % LINE_BYTES == 0, address
    fields = (address, shape.panels, shape.panel_bytes, shape.inputs, shape.groups)
    return np.array(fields, LINEAR)


def pack(weight: np.ndarray, shape: PackedShape) -> np.ndarray:
    """weight `[outputs, inputs]` float32 as `[size_bytes]` uint8."""
    padded = np.zeros((shape.panels * PANEL, up_to(shape.inputs, GROUP)), np.float32)
    padded[: shape.outputs, : shape.inputs] = weight
    if not shape.int8:
        panels = padded[:, : shape.inputs].reshape(shape.panels, PANEL, shape.inputs)
        return np.ascontiguousarray(panels.transpose(0, 2, 1)).reshape(-1).view(np.uint8)
    groups = padded.reshape(shape.panels, PANEL, shape.groups, GROUP)
    scales = np.maximum(np.abs(groups).max(axis=-1), _SCALE_MIN) / _INT8_MAX
    quantized = np.rint(groups / scales[..., None]) + _ZERO_POINT
    packed = np.empty((shape.panels, shape.groups, GROUP_BYTES), np.uint8)
    quads = quantized.astype(np.uint8).reshape(shape.panels, PANEL, shape.groups, GROUP // 4, 4)
    packed[..., : GROUP * PANEL] = quads.transpose(0, 2, 3, 1, 4).reshape(
        shape.panels, shape.groups, GROUP * PANEL
    )
    of_groups = np.ascontiguousarray(scales.transpose(0, 2, 1), np.float32)
    packed[..., GROUP * PANEL :] = of_groups.view(np.uint8)
    return packed.reshape(-1)
