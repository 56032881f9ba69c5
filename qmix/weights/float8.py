"""A weight in float8 (E4M3) and its scales, brought to float32. Shape letters: see qmix.kernels."""

import numpy as np
import torch
from torch import Tensor

from qmix.weights.slabs import TILE_ELEMENTS, decoded


def dequantized(weight: Tensor, scales: Tensor, block: int) -> Tensor:
    """The products in float32, [N, K].

    Args:
        weight: float8_e4m3fn [N, K] on the CPU.
        scales: float32 [1] of the whole weight, or [N, G] of each row's blocks.
        block: inputs that share a scale; the last block may be short.
    """
    codes, columns = weight.view(torch.uint8).numpy(), weight.shape[1]
    # torch takes six times as long to convert E4M3 as numpy to look 256 values up.
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    factors = scales.numpy().reshape(1, 1) if scales.dim() == 1 else scales.numpy()
    step = max(1, TILE_ELEMENTS // columns)

    def decode(start: int, stop: int, out: Tensor) -> None:
        values = out.numpy()
        for first in range(start, stop, step):
            last = min(first + step, stop)
            tile = values[first - start : last - start]
            np.take(table, codes[first:last], out=tile, mode="clip")
            of_rows = factors if len(factors) == 1 else factors[first:last]
            with np.errstate(over="ignore", invalid="ignore"):
                for index in range(factors.shape[1]):
                    tile[:, index * block : (index + 1) * block] *= of_rows[:, index, None]

    return decoded(0, len(codes), columns, torch.float32, decode)
