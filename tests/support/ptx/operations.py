"""Instructions that compute a lane's value from values of that lane: a table by opcode.

An operation takes arrays, one element a lane, and gives an array. Operations on floats round once,
as PTX asks of them, but for two: approximations (ex2, rsqrt, div.full) are as exact as float32, and
fma.rn.f32 is rounded to float64 first. Numpy's warnings must be off. Knows no registers and no
masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
} | {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
}

_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@dataclass(frozen=True)
class Operation:
    """A function of arrays, the types of what it takes, and that of what it gives."""

    function: Callable
    sources: tuple[str, ...]
    result: str


OPERATIONS: dict[str, Operation] = {}


def add(opcode, function, sources, result):
    """Enter an operation; sources are separated by blanks."""
    assert opcode not in OPERATIONS, opcode
    OPERATIONS[opcode] = Operation(function, tuple(sources.split()), result)


def _quotient(a, b):
    """Integer division that truncates, in the wider type."""
    return (np.abs(a) // np.abs(b)) * np.sign(a) * np.sign(b)


def _divide(a, b):
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    return _quotient(wide_a, wide_b).astype(a.dtype)


def _remainder(a, b):
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    return (wide_a - _quotient(wide_a, wide_b) * wide_b).astype(a.dtype)


def _high(a, b):
    bits = 8 * a.dtype.itemsize
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype)


def _wide(result):
    def multiply(a, b):
        return a.astype(result) * b.astype(result)

    return multiply


def _left(value, amount):
    """Amounts of the width and above give 0."""
    bits = 8 * value.dtype.itemsize
    shifted = value << np.minimum(amount, bits - 1).astype(value.dtype)
    return np.where(amount < bits, shifted, 0).astype(value.dtype)


def _right(value, amount):
    """Amounts of the width and above give 0, or the sign."""
    bits = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, bits - 1).astype(value.dtype)
    if value.dtype.kind == "i":
        return shifted
    return np.where(amount < bits, shifted, 0).astype(value.dtype)


def _extract(value, start, length):
    """bfe: `length` bits from bit `start` on; signed ones are extended by their highest bit."""
    start, length = (part.astype(np.int64) & 255 for part in (start, length))
    end = np.minimum(start + length, 32)
    wide = value.astype(np.int64)
    field = (wide >> np.minimum(start, 63)) & ((np.int64(1) << length.clip(max=32)) - 1)
    if value.dtype.kind == "i":
        sign = (wide >> np.clip(end - 1, 0, 31)) & 1
        field = field | np.where(sign == 1, np.int64(-1) << np.maximum(end - start, 0), 0)
    return np.where(length == 0, 0, field).astype(value.dtype)


def _insert(field, into, start, length):
    """bfi: the low `length` bits of `field`, at bit `start` of `into`."""
    start, length = (part.astype(np.uint64) & np.uint64(255) for part in (start, length))
    mask = (np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)
    mask = mask << np.minimum(start, 32)
    moved = field.astype(np.uint64) << np.minimum(start, 32)
    return ((into & ~mask) | (moved & mask)).astype(np.uint32)


def _funnel(low, high, distance):
    """shf.r.wrap: the low half of both, shifted right by the distance modulo 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (both >> (distance & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _permute(a, b, selector):
    """prmt: each result byte is one of the eight of b and a, or copies of its highest bit."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = np.stack((a, b), -1).view(np.uint8)
    nibble = selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    byte = np.take_along_axis(both, (nibble & np.uint32(7)).astype(np.intp), -1)
    byte = np.where(nibble & np.uint32(8), (byte >> np.uint8(7)) * np.uint8(255), byte)
    return byte.view(np.uint32)[..., 0]


def _logic(a, b, c, table):
    """lop3: bit i of the table, a constant, is the result where the bits of a, b, c spell i."""
    result = np.uint32(0)
    for spelled in range(8):
        if int(table) >> spelled & 1:
            first = a if spelled & 4 else ~a
            second = b if spelled & 2 else ~b
            result = result | first & second & (c if spelled & 1 else ~c)
    return result


def _fused(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _flushed(function):
    """`.ftz`: subnormal operands and results count as zero."""

    def flush(value):
        return np.where(np.abs(value) < np.float32(2.0**-126), value * np.float32(0), value)

    def run(*values):
        return flush(function(*map(flush, values)))

    return run


def _truncated(result):
    """cvt.rzi: towards zero; what does not fit becomes the nearest value, NaN 0."""
    least, most = np.iinfo(result).min, np.iinfo(result).max

    def convert(value):
        whole = np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0))
        return np.clip(whole, least, most).astype(result)

    return convert


def _integers():
    for bits in (16, 32, 64):
        for sign in "su":
            kind, one = f"{sign}{bits}", f"{sign}{bits} {sign}{bits}"
            add(f"add.{kind}", np.add, one, kind)
            add(f"sub.{kind}", np.subtract, one, kind)
            add(f"min.{kind}", np.minimum, one, kind)
            add(f"max.{kind}", np.maximum, one, kind)
            add(f"div.{kind}", _divide, one, kind)
            add(f"rem.{kind}", _remainder, one, kind)
            add(f"mul.lo.{kind}", np.multiply, one, kind)
            add(f"mad.lo.{kind}", lambda a, b, c: a * b + c, f"{one} {kind}", kind)
            add(f"shr.{kind}", _right, f"{kind} u32", kind)
            if wide := _WIDER.get(kind):
                multiply = _wide(TYPES[wide])
                add(f"mul.hi.{kind}", _high, one, kind)
                add(f"mul.wide.{kind}", multiply, one, wide)
                add(
                    f"mad.wide.{kind}",
                    lambda a, b, c, multiply=multiply: multiply(a, b) + c,
                    f"{one} {wide}",
                    wide,
                )
        add(f"neg.s{bits}", np.negative, f"s{bits}", f"s{bits}")
        add(f"abs.s{bits}", np.abs, f"s{bits}", f"s{bits}")
        add(f"shl.b{bits}", _left, f"b{bits} u32", f"b{bits}")
        add(f"shr.b{bits}", _right, f"b{bits} u32", f"b{bits}")
    for sign in "su":
        add(f"bfe.{sign}32", _extract, f"{sign}32 u32 u32", f"{sign}32")
    add("shf.r.wrap.b32", _funnel, "b32 b32 u32", "b32")
    add("bfi.b32", _insert, "b32 b32 u32 u32", "b32")
    add("prmt.b32", _permute, "b32 b32 b32", "b32")
    add("lop3.b32", _logic, "b32 b32 b32 b32", "b32")


def _bits():
    for kind in ("b16", "b32", "b64", "pred"):
        two = f"{kind} {kind}"
        add(f"and.{kind}", np.bitwise_and, two, kind)
        add(f"or.{kind}", np.bitwise_or, two, kind)
        add(f"xor.{kind}", np.bitwise_xor, two, kind)
        add(f"not.{kind}", np.invert, kind, kind)
        add(f"mov.{kind}", lambda a: a, kind, kind)
    kinds = [f"{letter}{bits}" for letter in "bsu" for bits in (16, 32, 64)]
    for kind in (*kinds, "f32", "f64"):
        add(f"selp.{kind}", lambda a, b, p: np.where(p, a, b), f"{kind} {kind} pred", kind)
        if f"mov.{kind}" not in OPERATIONS:
            add(f"mov.{kind}", lambda a: a, kind, kind)
        if kind[0] == "f":
            continue
        for target in ("u16", "s16", "u32", "s32", "u64", "s64"):
            if kind[0] != "b":
                dtype = TYPES[target]
                add(f"cvt.{target}.{kind}", lambda a, d=dtype: a.astype(d), kind, target)
        if kind[0] == "s":  # bytes lie in registers of 16 bits, which the sign fills
            dtype = TYPES[kind]
            add(f"cvt.s8.{kind}", lambda a: a.astype(np.int8).astype(np.int16), kind, "s16")
            add(f"cvt.{kind}.s8", lambda a, d=dtype: a.astype(np.int8).astype(d), "s16", kind)


def _comparisons():
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    for bits in (16, 32, 64):
        for letter in "bsu":
            for name, function in compare.items():
                if letter != "b" or name in ("eq", "ne"):
                    kind = f"{letter}{bits}"
                    _set(name, function, kind)
    for name, function in compare.items():  # of NaN: false, or with a u true
        ordered = function

        def both(a, b, function=function):
            return function(a, b) & ~(np.isnan(a) | np.isnan(b))

        _set(name, both if name == "ne" else ordered, "f32")
        _set(f"{name}u", lambda a, b, f=function: f(a, b) | np.isnan(a) | np.isnan(b), "f32")
    _set("num", lambda a, b: ~(np.isnan(a) | np.isnan(b)), "f32")
    _set("nan", lambda a, b: np.isnan(a) | np.isnan(b), "f32")


def _set(name, function, kind):
    add(f"setp.{name}.{kind}", function, f"{kind} {kind}", "pred")
    for word, join in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        add(
            f"setp.{name}.{word}.{kind}",
            lambda a, b, c, join=join: join(function(a, b), c),
            f"{kind} {kind} pred",
            "pred",
        )


def _floats():
    two = "f32 f32"
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        for rounding in ("", ".rn"):
            add(f"{name}{rounding}.f32", function, two, "f32")
            add(f"{name}{rounding}.ftz.f32", _flushed(function), two, "f32")
    for name, function in (("min", np.fmin), ("max", np.fmax)):  # the operand that is no NaN
        add(f"{name}.f32", function, two, "f32")
        add(f"{name}.ftz.f32", _flushed(function), two, "f32")
    add("min.NaN.f32", np.minimum, two, "f32")
    add("max.NaN.f32", np.maximum, two, "f32")
    add("fma.rn.f32", _fused, f"{two} f32", "f32")
    for name in ("div.full.f32", "div.rn.f32", "div.approx.f32"):
        add(name, np.divide, two, "f32")
    one = np.float32(1)
    for name, function in (
        ("neg", np.negative),
        ("abs", np.abs),
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("rsqrt.approx", lambda a: one / np.sqrt(a)),
        ("sqrt.approx", np.sqrt),
        ("rcp.approx", lambda a: one / a),
    ):
        add(f"{name}.f32", function, "f32", "f32")
        add(f"{name}.ftz.f32", _flushed(function), "f32", "f32")
    add("sqrt.rn.f32", np.sqrt, "f32", "f32")
    add("cvt.rn.f32.s8", lambda a: a.astype(np.int8).astype(np.float32), "s16", "f32")
    for kind in ("s16", "s32", "u32", "s64", "u64"):
        add(f"cvt.rn.f32.{kind}", lambda a: a.astype(np.float32), kind, "f32")
        add(f"cvt.rzi.{kind}.f32", _truncated(TYPES[kind]), "f32", kind)


_integers()
_bits()
_comparisons()
_floats()
