"""Arithmetic of 16-bit floats, single and packed by two, and conversions between formats.

A bfloat16 is the upper half of a float32, so that it is computed as one and rounded to nearest,
ties to even. Sums and products of two float16 values are rounded from float32, which is exact
enough to round only once; a fused multiply and add is rounded from float64.
"""

import numpy as np

from tests.support.ptx.operations import OPERATIONS, add


def widen(bits):
    """bfloat16 bits, uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(value):
    """float32 -> bfloat16 bits, uint16."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _halves(bits):
    """uint32 [lanes] -> the low and the high 16 bits."""
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def _join(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _half(function):
    """A function of float64 values as one of float16 bits."""

    def run(*values):
        wide = (value.view(np.float16).astype(np.float64) for value in values)
        return np.asarray(function(*wide)).astype(np.float16).view(np.uint16)

    return run


def _bfloat(function):
    def run(*values):
        wide = (widen(value).astype(np.float64) for value in values)
        return narrow(np.asarray(function(*wide)).astype(np.float32))

    return run


def _pairs(function):
    """A function of 16-bit values as one of both halves of 32-bit ones."""

    def run(*values):
        lows, highs = zip(*map(_halves, values), strict=True)
        return _join(function(*lows), function(*highs))

    return run


def _arithmetic():
    functions = {
        "add": (np.add, 2),
        "sub": (np.subtract, 2),
        "mul": (np.multiply, 2),
        "min": (np.fmin, 2),
        "max": (np.fmax, 2),
        "fma": (lambda a, b, c: a * b + c, 3),
        "neg": (np.negative, 1),
        "abs": (np.abs, 1),
    }
    for kind, wrap in (("f16", _half), ("bf16", _bfloat)):
        for name, (function, count) in functions.items():
            single = wrap(function)
            roundings = (".rn",) if name == "fma" else ("", ".rn") if count == 2 else ("",)
            for rounding in roundings if name not in ("min", "max") else ("",):
                types = " ".join([kind] * count).replace("f16", "b16").replace("bb16", "b16")
                add(f"{name}{rounding}.{kind}", single, types, "b16")
                wide = types.replace("b16", "b32")
                add(f"{name}{rounding}.{kind}x2", _pairs(single), wide, "b32")


def _conversions():
    def to_half(value):
        return value.astype(np.float16).view(np.uint16)

    add("cvt.f32.f16", lambda a: a.view(np.float16).astype(np.float32), "b16", "f32")
    add("cvt.f32.bf16", widen, "b16", "f32")
    for kind, convert in (("f16", to_half), ("bf16", narrow)):
        add(f"cvt.rn.{kind}.f32", convert, "f32", "b16")
        # The first operand becomes the upper half.
        add(
            f"cvt.rn.{kind}x2.f32",
            lambda high, low, convert=convert: _join(convert(low), convert(high)),
            "f32 f32",
            "b32",
        )
    for kind in ("s16", "u16", "s32", "u32"):
        add(
            f"cvt.rn.f16.{kind}",
            lambda a: a.astype(np.float64).astype(np.float16).view(np.uint16),
            kind,
            "b16",
        )


_arithmetic()
_conversions()
assert "fma.rn.bf16x2" in OPERATIONS
