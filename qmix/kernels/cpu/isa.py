"""The instruction sets of the compiled kernels, and the one that is used.

`QMIX_CPU_KERNELS` chooses one for tests and for comparisons; `torch` means none of them. Without it
the best one that the processor has is used.
"""

import os

from qmix.errors import UsageError

VARIABLE = "QMIX_CPU_KERNELS"
ISAS = ("portable", "avx2", "avx512", "vnni")  # by their numbers in csrc/structs.h
TORCH = "torch"


def requested() -> str | None:
    """One of ISAS, or `torch`; None if the variable is not set.

    Raises:
        UsageError: the variable names something else.
    """
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in (TORCH, *ISAS):
        raise UsageError(
            "no such CPU kernels",
            where=VARIABLE,
            expected=", ".join((TORCH, *ISAS)),
            found=name,
        )
    return name


def supported(name: str | None, best: int) -> str:
    """The instruction set to use.

    Args:
        name: the requested one; None is the best.
        best: the number of the best one that this processor has.

    Raises:
        UsageError: this processor lacks the requested one.
    """
    if name is None:
        return ISAS[best]
    if ISAS.index(name) > best:
        raise UsageError(
            "this processor lacks such kernels",
            where=VARIABLE,
            expected=", ".join((TORCH, *ISAS[: best + 1])),
            found=name,
        )
    return name
