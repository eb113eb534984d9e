"""Powers, logarithm and tanh of vectors, each as exact as it says."""

import math

from llvmlite import ir

from kvrelay.engine.kernels.vector import F32, I32, LANES, Code, Ints, Vec

_ROOT_HALF_BITS = 0x3F3504F3
# 2^x on [-1/2, 1/2] within 7.5e-5 of itself: minimax.
_EXP2_COARSE_TERMS = (0.055171669359518616, 0.24261113138276297, 0.693260986202962, 0.999928072997)
_EXP2_TERMS = [math.log(2) ** power / math.factorial(power) for power in range(6, -1, -1)]
TO_INTEGER = 1.5 * 2.0**23  # added to a float, leaves it rounded in the sum's last bits


def exp(c: Code, x: Vec) -> Vec:
    """Within 2 ulp; 0 below -87, and the value at 88 above it.

    2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor to the 7th power: below 1e-8).
    """
    b = c.builder
    inside = c.select_less(c.floats(88.0), x, 88.0, x)
    n = c.call("llvm.rint.v16f32", F32, (inside * 1.4426950408889634).value)
    whole = Vec(c, n)
    # ln 2 in two parts, so that the product with n is exact in the first.
    rest = c.fma(whole, c.floats(-0.693359375), inside)
    rest = c.fma(whole, c.floats(2.12194440e-4), rest)
    total = c.floats(1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        total = c.fma(total, rest, c.floats(1 / divisor))
    exponent = b.add(b.fptosi(n, I32), ir.Constant(I32, [127] * LANES))
    power = b.bitcast(b.shl(exponent, ir.Constant(I32, [23] * LANES)), F32)
    return c.select_less(x, -87.0, 0.0, total * Vec(c, power))


def exp2(c: Code, x: Vec) -> Vec:
    """2^x for x <= 0, within 3 ulp; 0 below -125. Taylor on [-1/2, 1/2], to the 6th power."""
    b = c.builder
    n = c.call("llvm.rint.v16f32", F32, x.value)
    rest = x - Vec(c, n)
    total = c.floats(_EXP2_TERMS[0])
    for term in _EXP2_TERMS[1:]:
        total = c.fma(total, rest, c.floats(term))
    exponent = b.shl(b.fptosi(n, I32), ir.Constant(I32, [23] * LANES))
    power = b.add(b.bitcast(total.value, I32), exponent)
    return c.select_less(x, -125.0, 0.0, Vec(c, b.bitcast(power, F32)))


def exp2_coarse(c: Code, x: Vec) -> Vec:
    """2^x for x below 100, within 1e-4 of itself; 0 below -125."""
    b = c.builder
    shifted = x + TO_INTEGER
    rest = x - (shifted - TO_INTEGER)
    total = c.floats(_EXP2_COARSE_TERMS[0])
    for term in _EXP2_COARSE_TERMS[1:]:
        total = c.fma(total, rest, c.floats(term))
    exponent = b.shl(b.bitcast(shifted.value, I32), ir.Constant(I32, [23] * LANES))
    power = b.add(b.bitcast(total.value, I32), exponent)
    # Of integers: one masked addition.
    low = b.fcmp_ordered("<", x.value, c.floats(-125.0).value)
    return Vec(c, b.bitcast(b.select(low, c.ints(0).value, power), F32))


def log2(c: Code, x: Vec) -> Vec:
    """Of normal numbers above 0, within 3e-7 of 1 or of itself, whichever is more."""
    b = c.builder
    bits = b.bitcast(x.value, I32)
    # The exponent of the power of two that is nearest: what is left is in [0.71, 1.42).
    above = b.sub(bits, ir.Constant(I32, [_ROOT_HALF_BITS] * LANES))
    exponent = b.ashr(above, ir.Constant(I32, [23] * LANES))
    left = b.sub(bits, b.shl(exponent, ir.Constant(I32, [23] * LANES)))
    mantissa = Vec(c, b.bitcast(left, F32))
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    total = c.floats(2 / (9 * math.log(2)))
    for odd in (7, 5, 3, 1):
        total = c.fma(total, square, c.floats(2 / (odd * math.log(2))))
    return c.fma(total, ratio, c.to_float(Ints(c, exponent)))


def tanh(c: Code, x: Vec) -> Vec:
    """1 - 2 / (exp(2x) + 1): exact enough where it is used, and ±1 far out."""
    return c.floats(1.0) - c.floats(2.0) / (exp(c, x * 2.0) + 1.0)
