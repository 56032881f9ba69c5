"""HQQ's layout, 1 to 8 bits with groups of inputs: the tensors of one weight, read.

The weight is cut into rows of one group each. A byte, or a 32-bit word of 3-bit codes, holds codes
of as many rows, which lie far apart: a byte of 4-bit codes has one row of the first half in its
high bits, and one of the second half in its low bits (hqq 0.2.8, core/bitpack.py). Knows nothing of
files. Shape letters: see qmix.kernels; R here are the groups of the whole weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts import hqq_config
from qmix.formats.layouts.checked_tensors import CheckedTensors
from qmix.quantities import counted
from qmix.weights.affine import Affine

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SLAB = 1 << 17  # words whose codes are moved at once, in the cache
_MAX_TEXT = 64


@dataclass(frozen=True)
class Packing:
    """How codes lie in W_q.

    Attributes:
        shifts: of each part's codes in a byte or word; the first part has the first rows.
        bits: of a code in W_q.
        dtype: of W_q.
        nbits: what may be said of the bits.
    """

    shifts: tuple[int, ...]
    bits: int
    dtype: torch.dtype
    nbits: tuple[float, ...]

    @property
    def held_bits(self) -> int:
        """Bits of a code in memory: codes of one bit take two."""
        return max(self.bits, 2)


_PACKINGS: Mapping[str, Packing] = {
    "8bit_u8": Packing((0,), 8, torch.uint8, (8, 6, 5)),
    "4bit_u8": Packing((4, 0), 4, torch.uint8, (4,)),
    "3bit_32": Packing(tuple(range(27, -1, -3)), 3, torch.int32, (3,)),
    # hqq keeps 1.58 bits as a float, and reads it as 1.
    "2bit_u8": Packing((6, 4, 2, 0), 2, torch.uint8, (2, 1.58, 1)),
    "1bit_u8": Packing(tuple(range(7, -1, -1)), 1, torch.uint8, (1,)),
}


def unpack(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Affine:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
        UnsupportedError: groups along the outputs, or scales that are themselves quantized.
    """
    stored = HQQTensors(tensors, prefix, where)
    rows, columns = shape
    stored.check_flags()
    found = tuple(stored.tensor(hqq_config.SHAPE, torch.int64, (2,)).tolist())
    if found != shape:
        raise stored.wrong(hqq_config.SHAPE, "not the model's shape", list(shape), list(found))
    packing = stored.packing()
    size = stored.group_size(columns)
    groups = rows * columns // size
    codes = _codes(stored.words(packing, groups, size), packing, groups)
    scales = stored.per_group(hqq_config.SCALE, groups, None)
    zeros = stored.per_group(hqq_config.ZERO, groups, scales.dtype)
    return Affine(
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        zeros=zeros.reshape(rows, -1),
        bits=packing.held_bits,
    )


class HQQTensors(CheckedTensors):
    """The stored tensors of one weight of HQQ."""

    def unread(self, suffix: str, what: str, expected: object, found: object) -> NoReturn:
        """Refuse what hqq computes and qmix does not."""
        raise UnsupportedError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=found,
            remedy=hqq_config.REMEDY,
        )

    def check_flags(self) -> None:
        """Check what is constant in the files that are read."""
        for suffix in (hqq_config.QUANT_SCALE, hqq_config.QUANT_ZERO):
            if self._flag(suffix, default=False):
                self.unread(suffix, "scales that are quantized themselves are not read", 0, 1)
        if not self._flag(hqq_config.CHANNEL_WISE, default=True):
            self.unread(hqq_config.CHANNEL_WISE, "one scale for a whole weight is not read", 1, 0)
        axis = self._number(hqq_config.AXIS)
        if axis == 0:
            self.unread(hqq_config.AXIS, "groups along the outputs are not read", 1, 0)
        if axis != 1:
            raise self.wrong(hqq_config.AXIS, "wrong value", 1, axis)
        if self.has(hqq_config.COMPUTE_DTYPE):
            allowed = [str(dtype) for dtype in _FLOATS]
            self._text(hqq_config.COMPUTE_DTYPE, allowed)

    def packing(self) -> Packing:
        """The packing, which `nbits` and `unpack_view_dtype` confirm."""
        name = self._text(hqq_config.PACKING, _PACKINGS)
        packing = _PACKINGS[name]
        bits = self._number(hqq_config.NBITS)
        if not any(abs(bits - allowed) < 1e-6 for allowed in packing.nbits):
            expected = " or ".join(map(str, packing.nbits))
            raise self.wrong(hqq_config.NBITS, f"not the bits of {name}", expected, bits)
        if self.has(hqq_config.UNPACK_DTYPE):
            self._text(hqq_config.UNPACK_DTYPE, [str(packing.dtype)])
        return packing

    def group_size(self, columns: int) -> int:
        """Inputs a group; hqq's configuration takes multiples of 8."""
        size = self._number(hqq_config.GROUP_SIZE)
        if size < 1 or columns % size or size % 8:
            expected = f"a multiple of 8 that divides {columns} inputs"
            raise self.wrong(hqq_config.GROUP_SIZE, "groups straddle outputs", expected, size)
        return int(size)

    def words(self, packing: Packing, groups: int, size: int) -> Tensor:
        """W_q in its own dtype, [R / parts, size]."""
        parts = len(packing.shifts)
        if packing.bits != 3 and groups % parts:
            expected = f"a multiple of {parts} groups"
            raise self.wrong(hqq_config.W_Q, "no whole bytes", expected, groups)
        words = self.tensor(hqq_config.W_Q)
        if self._flag(hqq_config.VIEW_AS_FLOAT, default=False):
            if words.dtype not in _FLOATS or words.dim() != 2:
                found = f"{words.dtype} {list(words.shape)}"
                raise self.wrong(hqq_config.W_Q, "not viewed as floats", "a float matrix", found)
            if words.shape[1] * words.itemsize % packing.dtype.itemsize:
                raise self.wrong(
                    hqq_config.W_Q, "wrong shape", counted(size, "code"), words.shape[1]
                )
            words = words.view(packing.dtype)
        expected_shape = (-(-groups // parts), size)
        if words.dtype != packing.dtype:
            raise self.wrong(hqq_config.W_Q, "wrong dtype", packing.dtype, words.dtype)
        if words.shape != expected_shape:
            raise self.wrong(hqq_config.W_Q, "wrong shape", list(expected_shape), list(words.shape))
        return words

    def per_group(self, suffix: str, groups: int, dtype: torch.dtype | None) -> Tensor:
        """Finite floats [R, 1]: scales or zeros."""
        values = self.tensor(suffix, dtype, (groups, 1))
        if values.dtype not in _FLOATS:
            raise self.wrong(suffix, "wrong dtype", "float16, bfloat16 or float32", values.dtype)
        if invalid := values.numel() - int(torch.isfinite(values).sum()):
            raise self.wrong(
                suffix, "holds NaN or infinity", "finite values", counted(invalid, "other")
            )
        return values

    def _number(self, suffix: str) -> float:
        """A number that is stored as int32, or as float32 if it is a fraction."""
        value = self.tensor(suffix, None, ())
        if value.dtype not in (torch.int32, torch.float32):
            raise self.wrong(suffix, "wrong dtype", "int32 or float32", value.dtype)
        return value.item()

    def _flag(self, suffix: str, *, default: bool) -> bool:
        """A flag that is stored as uint8; `default` if older versions did not store it."""
        if not self.has(suffix):
            return default
        value = int(self.tensor(suffix, torch.uint8, ()))
        if value > 1:
            raise self.wrong(suffix, "wrong value", "0 or 1", value)
        return bool(value)

    def _text(self, suffix: str, allowed: "list[str] | Mapping[str, object]") -> str:
        """A text that is stored as uint8, a character each."""
        characters = self.tensor(suffix, torch.uint8)
        text = bytes(characters.view(-1)[:_MAX_TEXT].tolist()).decode("latin-1")
        if characters.dim() != 1 or len(characters) > _MAX_TEXT or text not in allowed:
            raise self.wrong(suffix, "wrong text", " or ".join(allowed), ascii(text))
        return text


def _codes(words: Tensor, packing: Packing, groups: int) -> Tensor:
    """W_q -> the codes of `Affine`, uint8 [R, size * bits / 8]; size is a multiple of 8."""
    if packing.bits == 8:
        return words
    bits, each = packing.held_bits, len(words)
    codes = np.empty((groups, words.shape[1] * bits // 8), np.uint8)
    step = max(1, _SLAB // words.shape[1])
    stored = words.contiguous().numpy()
    for start in range(0, each, step):
        slab = stored[start : start + step]
        for part, shift in enumerate(packing.shifts):
            first = part * each + start
            rows = codes[first : first + len(slab)]  # fewer at the end, where words are padded
            rows[:] = _repacked(slab[: len(rows)], shift, packing.bits)
    return torch.from_numpy(codes)


def _repacked(words: NDArray[Any], shift: int, bits: int) -> NDArray[np.uint8]:
    """The codes that lie at `shift` in each word, as a stream of bits.

    Neighbours are moved together in words of two, four or eight codes, on all codes at once.
    """
    if bits == 4:
        pairs = words.view("<u2") >> shift & 0x0F0F
        return (pairs | pairs >> 4).astype(np.uint8)
    if bits == 3:
        two = words.view("<u8") >> shift & 0x0000_0007_0000_0007
        sixes = (two | two >> 29).astype("<u4").reshape(len(words), words.shape[1] // 8, 4)
        eight = sixes[..., 0] | sixes[..., 1] << 6 | sixes[..., 2] << 12 | sixes[..., 3] << 18
        octets: NDArray[np.uint8] = eight[..., None].view(np.uint8)[..., :3]
        return octets.reshape(len(words), words.shape[1] * bits // 8)
    fours = words.view("<u4") >> shift & ((1 << bits) - 1) * 0x01010101
    fours |= fours >> 6
    return (fours | fours >> 12).astype(np.uint8)
