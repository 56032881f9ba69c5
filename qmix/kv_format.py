"""KVFormat: in how many bits a cache keeps keys and values. Knows no torch and no cache.

"16" keeps them in the model's dtype. "int8" keeps each head's vector of d numbers as d codes of 8
bits and, behind them, the step from one code to the next in float32.
"""

from typing import Literal, get_args

from qmix.errors import UsageError

KVFormat = Literal["16", "int8"]

STEP_BYTES = 4  # of the float32 behind the codes
# Mean KL in nats a token: what a cache in 8 bits does to the tiny model at every position of a
# held-out text, and what NF4's weights do there (evals/records/2026-11-30-kv-int8.json, -accuracy).
INT8_KL, NF4_KL = 7.6e-4, 1.70e-2
_WHOLE = 4  # a row is read as float32, so that its codes have to fill whole ones


def named(name: object) -> KVFormat:
    """The format of a name; None: "16".

    Raises:
        UsageError: there is no format of this name.
    """
    known: dict[object, KVFormat] = {None: "16", **{each: each for each in get_args(KVFormat)}}
    if not isinstance(name, str | None) or name not in known:
        expected = " or ".join(map(repr, get_args(KVFormat)))
        raise UsageError("no such cache", where="kv", expected=expected, found=repr(name)[:80])
    return known[name]


def row_bytes(kv: KVFormat, width: int, item: int) -> int:
    """Bytes of a head's keys, or of its values, at one position.

    Args:
        width: of the head.
        item: bytes of the model's dtype.
    """
    return width * item if kv == "16" else width + STEP_BYTES


def check_width(kv: KVFormat, width: int) -> None:
    """Refuse heads whose rows have no such format.

    Raises:
        UsageError: an 8-bit cache and a width that is no multiple of 4.
    """
    if kv != "16" and width % _WHOLE:
        raise UsageError(
            "no 8-bit cache for heads of this width",
            where="kv",
            expected=f"a multiple of {_WHOLE}",
            found=width,
            remedy="Use kv='16'.",
        )
