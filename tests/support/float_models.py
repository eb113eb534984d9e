"""What the compiled matrix kernels should compute, in numpy, to the bit.

A fused multiply-add is modelled in extended precision and rounded to float32 once.
"""

import numpy as np

from kvrelay.engine.shapes import GROUP, GROUP_BYTES, PANEL, PackedShape

_INT8_MAX = 127
_SCALE_MIN = 1e-30


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, float32, rounded once."""
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float32)


def product(rows: np.ndarray, weight: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """rows `[n, inputs]` x weight `[outputs, inputs]`, added up in the order of the inputs.

    start `[n, outputs]`: what the sums begin with; None: 0.
    """
    total = np.zeros((len(rows), len(weight)), np.float32) if start is None else start.copy()
    for k in range(rows.shape[1]):
        total = fma(rows[:, k, None], weight[None, :, k], total)
    return total


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows `[n, groups * 64]`: bytes `[n, groups, 64]`, scales and corrections `[n, groups]`."""
    groups = rows.reshape(len(rows), -1, GROUP)
    largest = np.maximum(np.abs(groups).max(axis=-1), np.float32(_SCALE_MIN))
    scales = largest * np.float32(1 / _INT8_MAX)
    whole = np.rint(groups * (np.float32(1) / scales)[..., None]).astype(np.int32)
    return whole.astype(np.int8), scales, -128 * whole.sum(axis=-1)


def unpacked_int8(packed: np.ndarray, shape: PackedShape) -> tuple[np.ndarray, np.ndarray]:
    """Of packed weights: `[outputs, groups, 64]` integers, `[outputs, groups]` scales."""
    blocks = packed.reshape(shape.panels, shape.groups, GROUP_BYTES)
    stored = blocks[..., : GROUP * PANEL].reshape(shape.panels, shape.groups, GROUP // 4, PANEL, 4)
    weights = stored.transpose(0, 3, 1, 2, 4).reshape(shape.panels * PANEL, shape.groups, GROUP)
    scales = np.ascontiguousarray(blocks[..., GROUP * PANEL :]).view(np.float32)
    of_outputs = scales.transpose(0, 2, 1).reshape(shape.panels * PANEL, shape.groups)
    return weights[: shape.outputs].astype(np.int64) - 128, of_outputs[: shape.outputs]


def product_int8(rows: np.ndarray, packed: np.ndarray, shape: PackedShape) -> np.ndarray:
    """rows `[n, groups * 64]` float32 x packed weights: whole sums in a group, groups in order."""
    whole, scales, _ = quantized(rows)
    weights, weight_scales = unpacked_int8(packed, shape)
    total = np.zeros((len(rows), shape.outputs), np.float32)
    for group in range(shape.groups):
        sums = whole[:, group].astype(np.int64) @ weights[:, group].T
        factor = scales[:, group, None] * weight_scales[None, :, group]
        total = fma(sums.astype(np.float32), factor, total)
    return total
