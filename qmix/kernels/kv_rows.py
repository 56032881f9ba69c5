"""Keys and values in 8 bits: each vector of d numbers is a row of d codes and their step.

A row is int8 [d + 4]: the codes, -127 to 127, and the bytes of a float32, the step. The number is
code times step, where the step is the largest magnitude of the row by 127. Rows stay rows wherever
they are sliced, rolled, copied or stored by their positions, as keys and values in 16 bits do.

Knows no cache. Shape letters: see qmix.kernels.
"""

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.kernels.cpu.library import library
from qmix.kernels.gradients import needs_grad
from qmix.kv_format import STEP_BYTES, KVFormat

LARGEST = 127
_LEAST_STEP = torch.finfo(torch.float32).tiny  # of rows of zeros


def storage(kv: KVFormat, width: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """The last axis and the dtype of what stores heads of d numbers."""
    return (width, dtype) if kv == "16" else (width + STEP_BYTES, torch.int8)


def head_width(kv: KVFormat, stored: int) -> int:
    """The d of heads whose rows have so many elements."""
    return stored if kv == "16" else stored - STEP_BYTES


def is_rows(keys: Tensor) -> bool:
    """Whether keys or values are rows of codes."""
    return keys.dtype == torch.int8


def encoded(kv: KVFormat, x: Tensor) -> Tensor:
    """Keys or values [..., d] as a cache stores them.

    Raises:
        UnsupportedError: gradients are recorded, and codes have none.
    """
    if kv == "16":
        return x
    if needs_grad(x):
        raise UnsupportedError(
            "an 8-bit cache has no gradients",
            where="kv",
            remedy="Use torch.no_grad(), or use_cache=False.",
        )
    return quantized(x)


def quantized(x: Tensor) -> Tensor:
    """[..., d], d a multiple of 4, as rows int8 [..., d + 4]; NaN and infinity give rows of NaN."""
    x = x.contiguous()
    rows = torch.empty(*x.shape[:-1], x.shape[-1] + STEP_BYTES, dtype=torch.int8, device=x.device)
    if x.is_cpu and x.dtype == torch.bfloat16 and library().isa is not None:
        library().quantize_rows(x, rows)
        return rows
    x = x.float()
    step = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=_LEAST_STEP)
    rows[..., :-STEP_BYTES] = (x * (1 / step)).round_().nan_to_num_(0, 0, 0).to(torch.int8)
    steps(rows)[...] = step
    return rows


def steps(rows: Tensor) -> Tensor:
    """The steps of rows [..., d + 4]: a view, float32 [..., 1]."""
    return rows.view(torch.float32)[..., -1:]


def dequantized(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [..., d] of rows, or numbers in 16 or 32 bits as they are."""
    if not is_rows(rows):
        return rows
    return rows[..., :-STEP_BYTES].float().mul_(steps(rows)).to(dtype)


def fill_randomly(stored: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill stored keys or values with numbers of the standard normal distribution."""
    if not is_rows(stored):
        stored.normal_(generator=generator)
        return
    shape = (*stored.shape[:-1], stored.shape[-1] - STEP_BYTES)
    stored.copy_(quantized(torch.empty(shape, device=stored.device).normal_(generator=generator)))
