"""What decides whether our kernels can run on a GPU, and the reason where they cannot.

`Card.gather` looks at the machine; the reasons follow from what it saw. Imports triton and launches
nothing.
"""

import ctypes
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qmix.errors import UnsupportedError
from qmix.instruction_sets import LEAST_CAPABILITY

LEAST_TRITON = (3, 6)  # the oldest that the kernels were compiled with


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU, with the software that stands between it and the kernels.

    Attributes:
        capability: CUDA compute capability.
        hip: the version of ROCm that torch was built for; None: torch was built for CUDA.
        driver: the newest CUDA that the driver knows; None: it does not say.
        triton: its version; None: it cannot be imported.
        trouble: why it cannot.
        assembler: the CUDA whose assembler Triton brings; None: it does not say.
        compiler: the command by which Triton compiles its launcher; None: there is none.
        python_h: whether Python's header, which the launcher includes, is there.
    """

    name: str
    capability: tuple[int, int]
    hip: str | None = None
    driver: tuple[int, int] | None = None
    triton: str | None = None
    trouble: str | None = None
    assembler: tuple[int, int] | None = None
    compiler: str | None = None
    python_h: bool = True

    @classmethod
    def gather(cls, device: torch.device) -> "Card":
        """Look at a CUDA device and at this Python."""
        version, trouble = _triton()
        capability = torch.cuda.get_device_capability(device)
        return cls(
            name=torch.cuda.get_device_name(device),
            capability=capability,
            hip=torch.version.hip,
            driver=_driver(),
            triton=version,
            trouble=trouble,
            assembler=None if version is None else _assembler(capability),
            compiler=_compiler(),
            python_h=_python_h(),
        )

    @property
    def versions(self) -> str:
        """What a report of a failure should name."""
        parts = [f"torch {torch.__version__}", f"Triton {self.triton or 'missing'}"]
        if self.driver is not None:
            parts.append("driver for CUDA {}.{}".format(*self.driver))
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}, " + (
            ", ".join(parts)
        )

    def refusal(self) -> UnsupportedError | None:
        """Why the kernels cannot run; None: nothing speaks against a try."""
        for applies, what, expected, found, remedy in _REFUSALS:
            if applies(self):
                return UnsupportedError(
                    what, where=self.name, expected=expected, found=found(self), remedy=remedy
                )
        return None

    def explained(self, error: BaseException) -> UnsupportedError:
        """Why a try failed: what the machine lacks, or else what the failure said."""
        for applies, what, remedy in _CAUSES:
            if applies(self):
                return UnsupportedError(what, where=self.name, found=self.versions, remedy=remedy)
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return UnsupportedError(
            f"the kernels fail: {said}",
            where=self.name,
            found=self.versions,
            remedy="Report it, with the output of qmix doctor.",
        )


_REFUSALS: tuple[
    tuple[Callable[[Card], bool], str, str | None, Callable[[Card], str], str], ...
] = (
    (
        lambda card: card.hip is not None,
        "the kernels are written for NVIDIA's GPUs",
        "a torch built for CUDA",
        lambda card: f"one built for ROCm {card.hip}",
        "Install bitsandbytes, which multiplies NF4 and FP4 there.",
    ),
    (
        lambda card: card.capability < LEAST_CAPABILITY,
        "the GPU is too old for the kernels",
        "compute capability {}.{} or newer".format(*LEAST_CAPABILITY),
        lambda card: "{}.{}".format(*card.capability),
        "Install bitsandbytes, which multiplies NF4 and FP4 there.",
    ),
    (
        lambda card: card.triton is None,
        "Triton cannot be imported",
        None,
        lambda card: card.trouble or "nothing",
        "Run: pip install triton (on Windows: triton-windows)",
    ),
    (
        lambda card: _numbers(card.triton) < LEAST_TRITON,
        "Triton is too old for the kernels",
        "{}.{} or newer".format(*LEAST_TRITON),
        lambda card: card.triton or "",
        "Install a newer torch, which brings a newer Triton.",
    ),
)
_CAUSES: tuple[tuple[Callable[[Card], bool], str, str], ...] = (
    (
        lambda card: card.compiler is None,
        "Triton finds no C compiler for its launcher",
        "Install gcc or clang, or name one in $CC.",
    ),
    (
        lambda card: not card.python_h,
        "Triton's launcher includes Python.h, and it is not there",
        "Install Python's headers: python3-dev, or python3-devel.",
    ),
    (
        lambda card: card.driver is not None and card.driver < (card.assembler or (0, 0)),
        "the driver is too old for what Triton assembles",
        "Install a newer driver, or a torch built for an older CUDA.",
    ),
)


def _triton() -> tuple[str | None, str | None]:
    """The version of Triton, or why there is none."""
    try:
        import triton
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"[:200]
    return str(triton.__version__), None


def _assembler(capability: tuple[int, int]) -> tuple[int, int] | None:
    """The CUDA version of the assembler that Triton brings for such a GPU."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return _numbers(get_ptxas(10 * capability[0] + capability[1]).version)
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError):
        return None  # another Triton has it elsewhere; it only explains a failure


def _driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows."""
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _compiler() -> str | None:
    """The C compiler, as Triton chooses it."""
    named = os.environ.get("CC")
    if named:
        return named if shutil.which(named.split()[0]) else None
    return shutil.which("gcc") or shutil.which("clang")


def _python_h() -> bool:
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, whose headers lie elsewhere
        scheme = "posix_prefix"
    include = sysconfig.get_paths(scheme=scheme).get("include")
    return include is not None and (Path(include) / "Python.h").is_file()


def _numbers(version: str | None) -> tuple[int, int]:
    """The first two numbers of a version."""
    parts = (version or "0.0").split(".")
    return int(parts[0]), int("".join(filter(str.isdigit, parts[1])) or 0)
