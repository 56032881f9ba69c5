"""The instruction sets that the kernels are compiled for, and the CPU's that is used.

A library of kernels (kernels/cpu) is compiled for one set. The best one that the processor has is
used, unless `QMIX_CPU_PATH` names another, for tests and comparisons; `torch` there means none.
"""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import UsageError

# The oldest compute capability of a GPU; older matrix units lack an instruction.
LEAST_CAPABILITY = (8, 0)

VARIABLE = "QMIX_CPU_PATH"
TORCH = "torch"

_CPUINFO = Path("/proc/cpuinfo")
# arch_prctl on x86-64, and ARCH_REQ_XCOMP_PERM:
# https://docs.kernel.org/arch/x86/xstate.html
_ARCH_PRCTL, _REQUEST_STATE = 158, 0x1023
_X86 = ("x86_64", "AMD64")
_ARM = ("aarch64", "arm64")
_ALL: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InstructionSet:
    """One of them.

    Attributes:
        machines: what platform.machine() calls the processors that may have it; empty: all.
        needs: the features that it uses, as /proc/cpuinfo calls them.
        flags: what the compiler is told.
        state: the number of the registers that a process must ask Linux for; None: nothing to ask.
    """

    name: str
    machines: tuple[str, ...] = ()
    needs: frozenset[str] = _ALL
    flags: tuple[str, ...] = ()
    state: int | None = None


def _extended(
    base: InstructionSet, name: str, needs: str, flags: tuple[str, ...], state: int | None = None
) -> InstructionSet:
    return InstructionSet(
        name, base.machines, base.needs | set(needs.split()), (*base.flags, *flags), state
    )


_PORTABLE = InstructionSet("portable")
_NEON = InstructionSet("neon", _ARM, frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",))
_I8MM = InstructionSet("i8mm", _ARM, _NEON.needs | {"i8mm"}, ("-march=armv8.2-a+dotprod+i8mm",))
_AVX2 = InstructionSet(
    "avx2", _X86, frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")
)
_AVX_VNNI = _extended(_AVX2, "avx_vnni", "avx_vnni", ("-mavxvnni",))
_AVX512 = _extended(
    _AVX2,
    "avx512",
    "avx512f avx512bw avx512dq avx512vl",
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
)
_VNNI = _extended(_AVX512, "vnni", "avx512_vnni", ("-mavx512vnni",))
_AMX = _extended(_VNNI, "amx", "amx_tile amx_bf16", ("-mamx-tile", "-mamx-bf16"), 18)

# A processor's best one is the last that it has.
ISAS = {
    each.name: each for each in (_PORTABLE, _NEON, _I8MM, _AVX2, _AVX_VNNI, _AVX512, _VNNI, _AMX)
}

NEEDED = frozenset().union(*(each.needs for each in ISAS.values()))


def features() -> frozenset[str]:
    """What this processor has, in the words of /proc/cpuinfo.

    Where there is no such file, an Arm processor is taken to have the dot products of bytes: all
    of Apple's have them.
    """
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset({"asimddp"} if platform.machine() in _ARM else ())
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return _ALL


def of_architecture(machine: str) -> tuple[InstructionSet, ...]:
    """Those that some processors of an architecture have, the best one first.

    Args:
        machine: its name, as platform.machine() calls it.
    """
    return tuple(
        each for each in reversed(ISAS.values()) if not each.machines or machine in each.machines
    )


def supported() -> tuple[InstructionSet, ...]:
    """Those that this processor has and the system lets this process use, the best one first."""
    return tuple(each for each in _of_processor() if each.state is None or granted(each.state))


def refused() -> tuple[str, ...]:
    """Those that this processor has, but whose registers the system refuses to this process."""
    allowed = supported()
    return tuple(each.name for each in _of_processor() if each not in allowed)


def _of_processor() -> tuple[InstructionSet, ...]:
    found = features()
    return tuple(each for each in of_architecture(platform.machine()) if each.needs <= found)


def granted(state: int) -> bool:
    """Whether Linux lets this process use some registers, asked for here.

    A sandbox may forbid the question, and a kernel older than 5.16 does not know it.
    """
    from ctypes import CDLL

    return sys.platform == "linux" and not CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, state)


def candidates() -> tuple[InstructionSet, ...]:
    """Those that may be used, the best one first: none for `torch`, one if one is named.

    Raises:
        UsageError: the variable names something else, or one that cannot be used here.
    """
    name, here = os.environ.get(VARIABLE) or None, supported()
    if name is None:
        return here
    if name == TORCH:
        return ()
    found = tuple(each for each in here if each.name == name)
    if not found:
        known = (
            "the system refuses such kernels their registers"
            if name in refused()
            else "this processor lacks such kernels"
        )
        raise UsageError(
            known if name in ISAS else "no such CPU kernels",
            where=VARIABLE,
            expected=", ".join((TORCH, *(each.name for each in reversed(here)))),
            found=name,
        )
    return found
