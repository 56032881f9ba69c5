"""What the readers of the integer layouts share: checked access to one weight's tensors.

Shape letters: N output features, K input features, G groups. Knows no layout and no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.layouts.tensor_names import WORD_BITS
from qmix.weights.integers import Int4, Int8, Integers, symmetric_zero
from qmix.weights.scheme import GROUP_SIZES

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TYPES: Mapping[int, type[Integers]] = {4: Int4, 8: Int8}
GROUP_LIST = ", ".join(map(str, GROUP_SIZES)) + " inputs or all of them"


@dataclass(frozen=True)
class CheckedTensors:
    """The tensors of one weight; every method checks one, and names it if it is wrong.

    Attributes:
        tensors: by name; others than this weight's may be among them.
        prefix: the module's name.
        where: the file, for errors.
        shape: (N, K) of the model's weight.
    """

    tensors: Mapping[str, Tensor]
    prefix: str
    where: str
    shape: tuple[int, int]

    def wrong(
        self,
        suffix: str,
        what: str,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> CheckpointError:
        return CheckpointError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=None if found is None else str(found)[:200],
            remedy=remedy,
        )

    def unsupported(
        self, suffix: str, what: str, expected: object, found: object
    ) -> UnsupportedError:
        return UnsupportedError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=str(found)[:200],
            remedy="Quantize the original checkpoint with qmix quantize.",
        )

    def has(self, suffix: str) -> bool:
        return self.prefix + suffix in self.tensors

    def tensor(self, suffix: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> Tensor:
        """The tensor P.suffix; of any shape if that is None."""
        tensor = self.tensors.get(self.prefix + suffix)
        if tensor is None:
            raise self.wrong(suffix, "missing")
        if tensor.dtype != dtype:
            raise self.wrong(suffix, "wrong dtype", dtype, tensor.dtype)
        if shape is not None and tensor.shape != shape:
            raise self.wrong(suffix, "wrong shape", list(shape), list(tensor.shape))
        return tensor

    def scales(self, suffix: str, group_axis: int) -> Tensor:
        """Finite scales of N outputs, their groups on `group_axis` of the two, in the file's dtype.

        Negative ones are kept: a signed scale lets a symmetric group use all of -8 to 7.

        Raises:
            CheckpointError: another shape or dtype, NaN, infinity, or a group size not in the list.
        """
        tensor = self.tensors.get(self.prefix + suffix)
        if tensor is None:
            raise self.wrong(suffix, "missing")
        if tensor.dtype not in SCALE_DTYPES:
            raise self.wrong(suffix, "wrong dtype", "float16, bfloat16 or float32", tensor.dtype)
        rows, columns = self.shape
        if tensor.dim() != 2 or tensor.shape[1 - group_axis] != rows:
            expected = f"[groups, {rows}]" if group_axis == 0 else f"[{rows}, groups]"
            raise self.wrong(suffix, "wrong shape", expected, list(tensor.shape))
        groups = tensor.shape[group_axis]
        if groups != 1 and groups not in [columns / size for size in GROUP_SIZES]:
            found = f"{groups} groups of {columns} inputs"
            raise self.wrong(suffix, "unknown group size", GROUP_LIST, found)
        if wrong := tensor.numel() - int(torch.isfinite(tensor).sum()):
            raise self.wrong(suffix, "holds NaN or infinity", "finite values", f"{wrong} others")
        return tensor

    def permutation(self, suffix: str, groups: int) -> Tensor | None:
        """The order that sorts the inputs by group, int32 [K]; None if they are sorted already.

        Raises:
            CheckpointError: an index out of range, or a group with more inputs than the others.
        """
        columns = self.shape[1]
        index = self.tensor(suffix, torch.int32, (columns,))
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            bad = low if low < 0 else high
            raise self.wrong(suffix, "group index out of range", f"0 to {groups - 1}", bad)
        size = columns // groups
        counts = torch.bincount(index, minlength=groups)
        if not bool((counts == size).all()):
            group = int((counts != size).nonzero()[0])
            raise self.wrong(
                suffix,
                "groups of unequal size",
                f"{size} inputs in each of {groups} groups",
                f"{int(counts[group])} inputs in group {group}",
            )
        if bool((index[1:] >= index[:-1]).all()):
            return None
        return torch.argsort(index, stable=True).int()


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 or int64 [...] -> uint8 [..., 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=words.dtype)
    return ((words[..., None] >> shifts) & (1 << bits) - 1).to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32 / bits] of codes -> int32 [...]: the inverse of `unpack_words`."""
    shifts = torch.arange(0, WORD_BITS, bits)
    packed = (codes.long() << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def zeros_or_symmetric(zeros: Tensor, bits: int) -> Tensor | None:
    """`zeros` [N, G], or None where all are the symmetric one."""
    return None if bool((zeros == symmetric_zero(bits)).all()) else zeros
