"""The functions of the compiled library: their argument types, and one way to call them all.

Knows the C interface (csrc/kernels.cpp), not what its functions compute.
"""

import ctypes
import os
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qmix.errors import ResourceError
from qmix.kernels.cpu import ctypes_structs as structs

_FORKED = 0x40  # PF_FORKNOEXEC in Linux

# Every function takes threads and the entry to torch's threads besides. It returns 0, or 1 if there
# is no memory for the activations.
_ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "matmul": (POINTER(structs.Matmul), c_int64),
    "matmul_packed": (POINTER(structs.TiledMatrix), c_void_p, c_void_p, c_int64),
    "matmul_dense": (POINTER(structs.DenseMatmul),),
    "rms_norm": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float),
    "add_experts": (
        POINTER(structs.ExpertMatrices),
        c_int64,
        POINTER(structs.ExpertTokens),
        c_void_p,
        c_void_p,
        c_int32,
        c_int32,
    ),
    "before_attention": (
        POINTER(structs.TokenLayer), c_void_p, c_int64, c_void_p, c_void_p, c_void_p,
    ),
    "after_attention": (
        POINTER(structs.TokenLayer), POINTER(structs.TokenRoute), c_void_p, c_void_p, c_int64,
    ),
    "tokens_as_alone": (POINTER(structs.Matrix), POINTER(c_int64)),
    "decode_tokens": (c_void_p, c_int64, POINTER(structs.TokenStep)),
    "attend": (POINTER(structs.TokenAttention),),
    "quantize_rows": (c_void_p, c_void_p, c_int64, c_int64),
    "read": (c_void_p, c_int64, POINTER(c_uint64)),
}  # fmt: skip


@dataclass(frozen=True)
class Functions:
    """The compiled functions.

    Attributes:
        isa: the instruction set that they are compiled for, one of ISAS.
        fork: the entry to torch's threads; None starts threads for every call.
        process: the process whose threads those are.
        threads: how many a call is split for; None: torch's number.
    """

    library: ctypes.CDLL
    isa: str
    fork: int | None
    process: int = field(default_factory=os.getpid)
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, arguments in _ARGUMENTS.items():
            self._function(name).argtypes = (*arguments, c_int32, c_void_p)

    def call(self, name: str, *arguments: Any) -> None:
        """Call `qmix_name`; a tensor stands for its address, a structure or an array for its own.

        Raises:
            ResourceError: no memory for the activations.
        """
        failed = self._function(name)(
            *(each.data_ptr() if isinstance(each, Tensor) else each for each in arguments),
            torch.get_num_threads() if self.threads is None else self.threads,
            self.fork if os.getpid() == self.process else None,  # a forked child has no threads
        )
        if failed:
            raise ResourceError("no memory for the activations of a CPU kernel", where=name)

    def _function(self, name: str) -> Any:
        return getattr(self.library, f"qmix_{name}")


def torch_threads() -> int | None:
    """The entry of libgomp in the very copy that torch runs on: one pool of threads, not two.

    None where torch runs on another library, or where this process was forked off one whose threads
    it does not have: libgomp would wait for them forever.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
        if flags & _FORKED:
            return None
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return ctypes.cast(entry, c_void_p).value
