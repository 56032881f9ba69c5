"""Checked access to the stored tensors of one weight, and what all integer layouts share.

Knows no layout and no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.layouts.tensor_names import WORD_BITS
from qmix.quantities import counted
from qmix.weights.affine import symmetric_zero
from qmix.weights.dense import all_finite
from qmix.weights.scheme import GROUP_SIZES

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GROUP_SIZES = ", ".join(map(str, GROUP_SIZES)) + " inputs or all of them"
# Bits of a code -> the weight's class.
READ_BITS = (4, 8)  # of integers


@dataclass(frozen=True)
class CheckedTensors:
    """The stored tensors of one weight; each method checks one, and names it if it is wrong.

    Attributes:
        tensors: by name; tensors of other weights may be among them.
        prefix: the module's name.
        where: the file, for errors.
    """

    tensors: Mapping[str, Tensor]
    prefix: str
    where: str

    def wrong(
        self,
        suffix: str,
        what: str,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> CheckpointError:
        """The error of a tensor that is not what the layout says."""
        return CheckpointError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=None if found is None else str(found)[:200],
            remedy=remedy,
        )

    def has(self, suffix: str) -> bool:
        return self.prefix + suffix in self.tensors

    def tensor(
        self,
        suffix: str,
        dtype: torch.dtype | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The tensor P.suffix, of any dtype or shape if that is None.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        tensor = self.tensors.get(self.prefix + suffix)
        if tensor is None:
            raise self.wrong(suffix, "missing")
        if dtype is not None and tensor.dtype != dtype:
            raise self.wrong(suffix, "wrong dtype", dtype, tensor.dtype)
        if shape is not None and tensor.shape != shape:
            raise self.wrong(suffix, "wrong shape", list(shape), list(tensor.shape))
        return tensor


@dataclass(frozen=True)
class IntegerTensors(CheckedTensors):
    """The stored tensors of one weight of integers; `shape` is (N, K) of the model's weight."""

    shape: tuple[int, int]

    def unsupported(
        self, suffix: str, what: str, expected: object, found: object
    ) -> UnsupportedError:
        """The error of a tensor that is valid but not read."""
        return UnsupportedError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=str(found)[:200],
            remedy="Quantize the original checkpoint with qmix quantize.",
        )

    def scales(self, suffix: str, group_axis: int) -> Tensor:
        """The finite scales, [G, N] or [N, G] as `group_axis` is 0 or 1, in the file's dtype.

        Negative scales are valid: with them a symmetric group can use all of -8 to 7.

        Raises:
            CheckpointError: wrong shape or dtype, NaN, infinity, or an unknown group size.
        """
        scales = self.tensor(suffix)
        if scales.dtype not in _SCALE_DTYPES:
            raise self.wrong(suffix, "wrong dtype", "float16, bfloat16 or float32", scales.dtype)
        rows, columns = self.shape
        if scales.dim() != 2 or scales.shape[1 - group_axis] != rows:
            expected = f"[groups, {rows}]" if group_axis == 0 else f"[{rows}, groups]"
            raise self.wrong(suffix, "wrong shape", expected, list(scales.shape))
        groups = scales.shape[group_axis]
        if groups != 1 and groups not in [columns / size for size in GROUP_SIZES]:
            found = f"{counted(groups, 'group')} of {counted(columns, 'input')}"
            raise self.wrong(suffix, "unknown group size", _GROUP_SIZES, found)
        if not all_finite(scales):
            invalid = scales.numel() - int(torch.isfinite(scales).sum())
            raise self.wrong(
                suffix, "holds NaN or infinity", "finite values", counted(invalid, "other")
            )
        return scales

    def permutation(self, suffix: str, groups: int) -> Tensor | None:
        """The order that sorts the inputs by group, int32 [K]; None if they are sorted already.

        Raises:
            CheckpointError: an index out of range, or a group with more inputs than the others.
        """
        columns = self.shape[1]
        index = self.tensor(suffix, torch.int32, (columns,))
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            outside = low if low < 0 else high
            raise self.wrong(suffix, "group index out of range", f"0 to {groups - 1}", outside)
        size = columns // groups
        counts = torch.bincount(index, minlength=groups)
        if not bool((counts == size).all()):
            group = int((counts != size).nonzero()[0])
            raise self.wrong(
                suffix,
                "groups of unequal size",
                f"{counted(size, 'input')} in each of {groups} groups",
                f"{counted(int(counts[group]), 'input')} in group {group}",
            )
        if bool((index[1:] >= index[:-1]).all()):
            return None
        return torch.argsort(index, stable=True).int()


def as_words(octets: Tensor) -> Tensor:
    """uint8 [N, 4 n] -> int32 [N, n], little-endian. A transposed [1, 4 n] has strides of its own,
    which `view` refuses although it calls the tensor contiguous.
    """
    return octets.reshape(-1).view(torch.int32).view(octets.shape[0], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 or int64 [...] -> uint8 [..., 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=words.dtype, device=words.device)
    return ((words[..., None] >> shifts) & (1 << bits) - 1).to(torch.uint8)


def zeros_or_symmetric(zeros: Tensor, bits: int) -> Tensor | None:
    """`zeros` [N, G], or None if all of them are the symmetric zero."""
    return None if bool((zeros == symmetric_zero(bits)).all()) else zeros
