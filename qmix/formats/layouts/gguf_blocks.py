"""GGUF's blocks, written: a weight that fits one of its types exactly -> the bytes of its rows.

The inverse of layouts.gguf for Q4_0, Q4_1, Q8_0 and IQ4_NL, and dense weights. Knows no file.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.gguf.tensor_types import BY_NAME
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense, Weight
from qmix.weights.table import Table

DENSE_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
BLOCK = 32  # inputs
_TILE_CODES = 1 << 20


def pack(weight: Weight, kind: str) -> Tensor:
    """The rows of a weight in a type of GGUF's: uint8 [N, bytes of a row].

    Args:
        weight: in groups of 32 inputs in order, with scales and biases in float16: symmetric for
            Q4_0 and Q8_0, with biases for Q4_1, llama.cpp's table for IQ4_NL; or dense in the dtype
            of `kind`.
    """
    if isinstance(weight, Dense):
        assert DENSE_TYPES[weight.data.dtype] == kind
        return weight.data.contiguous().view(torch.uint8).view(weight.data.shape[0], -1)
    assert isinstance(weight, (Affine, Table))
    rows, columns = weight.shape
    count = columns // BLOCK
    parts = [weight.scales]
    if isinstance(weight, Affine) and weight.biases is not None:
        parts.append(weight.biases)
    out = np.empty((rows, count, BY_NAME[kind].block_bytes), np.uint8)
    for index, part in enumerate(parts):
        assert isinstance(part, Tensor)
        assert part.dtype == torch.float16
        halves = part.contiguous().view(torch.uint8).view(rows, count, 2)
        out[:, :, 2 * index : 2 * index + 2] = halves.numpy()
    codes = weight.codes.view(rows, -1).numpy()
    target = out[:, :, 2 * len(parts) :]
    step = max(1, _TILE_CODES // columns)
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        if kind == "Q8_0":
            target[tile] = (codes[tile] ^ 0x80).reshape(-1, count, BLOCK)
        else:
            target[tile] = _halves(codes[tile].reshape(-1, count, BLOCK // 2))
    return torch.from_numpy(out.reshape(rows, -1))


def _halves(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two neighbours in a byte -> inputs j and j + 16 in a byte: uint8 [N, b, 16]."""
    codes = np.empty((*pairs.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = pairs & 15, pairs >> 4
    flat = codes.reshape(*pairs.shape[:2], BLOCK)
    out: NDArray[np.uint8] = flat[..., : BLOCK // 2] | flat[..., BLOCK // 2 :] << np.uint8(4)
    return out
