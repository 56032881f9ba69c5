"""What the launchers of Triton kernels share: the launch itself, sizes of grids and blocks.

Knows no kernel.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qmix.kernels.gpu.current_device import on

# A product and a sum may become one instruction, which rounds once. Triton's own default is to
# change: 3.9 warns of it.
COMPILER_OPTIONS: Mapping[str, object] = {"enable_fp_fusion": True}

_only_compiles: ContextVar[bool] = ContextVar("launches compile only", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Start a Triton kernel on its grid, on the device of its first tensor.

    It is compiled first if these arguments need it.
    """
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    with on(device):
        if _only_compiles.get():
            kernel.warmup(*arguments, grid=grid, **constants, **COMPILER_OPTIONS)
        else:
            kernel[grid](*arguments, **constants, **COMPILER_OPTIONS)


@contextmanager
def only_compiling() -> Iterator[None]:
    """Within the block a launch compiles its kernel and starts nothing."""
    token = _only_compiles.set(True)
    try:
        yield
    finally:
        _only_compiles.reset(token)


def power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`."""
    return 1 << (count - 1).bit_length()


@cache
def multiprocessors(device: torch.device, *, interpreted: int) -> int:
    """The multiprocessors of a GPU; `interpreted` stands for them in the interpreter."""
    if device.type != "cuda":
        return interpreted
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def can_depend(device: torch.device) -> bool:
    """Whether a launch may start while the one before it drains: compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependency(dependent: bool) -> dict[str, object]:
    """The constants of a kernel that can be a dependent launch."""
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}
