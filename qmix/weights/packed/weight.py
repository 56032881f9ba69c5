"""Weights in the packed layout, as the models hold them and the kernels' table knows them.

The codes lie in the packed layout on the device. What packing rounds (scales), and what a file wants besides
(zeros, nested scales, the input order), stays on the host as it was, 2 % of the bytes: `standard` puts
both together and is the weight that was packed, bit for bit. A weight that never was a standard one
(drawn at random in the packed layout) keeps nothing, and its scales are those of the kernels.

Shape letters: N outputs, K inputs, E experts. Knows torch only; triton is imported by the first product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert, ExpertSequence
from qmix.weights.integers import Int4
from qmix.weights.nf4 import NF4
from qmix.weights.packed.layout import (
    PackedExpert,
    PackedMatrix,
    pack_expert,
    pack_matrix,
    rebased,
    same_order,
    spec_of,
    unpack_expert,
    unpack_matrix,
)
from qmix.weights.packed.packed_shapes import joined
from qmix.weights.packed.table import ExpertTable
from qmix.weights.scheme import Scheme

# Of an expert by name, of matrices with the same inputs that were joined by their rows.
Selection = Literal["w1", "w2", "w3"] | range

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [N, K] in the packed layout: a matrix of its own, or a part of an expert.

    Attributes:
        source: where its codes lie.
        selection: of the expert, or which rows of the matrix; None is all of it.
        template: the weight without its codes, on the host; None if there never was one.
    """

    source: PackedMatrix | PackedExpert
    selection: Selection | None
    template: Weight | None

    @property
    def matrix(self) -> PackedMatrix:
        """Its matrix; w1 and w3 of an expert share one, of twice the rows."""
        if isinstance(self.source, PackedMatrix):
            return self.source
        return self.source.down if self.selection == "w2" else self.source.gate_up

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        if isinstance(self.selection, range):
            return len(self.selection), columns
        return (rows if self.selection in (None, "w2") else rows // 2, columns)

    @property
    def scheme(self) -> Scheme:
        if self.template is not None:
            return self.template.scheme
        plan, group = self.matrix.format, self.matrix.group
        if plan.kind == "nf4":
            return Scheme(kind="nf4", block_size=group, double_quant=False)
        return Scheme(kind="int4", group_size=group, symmetric=plan.symmetric)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.blob.device

    @property
    def nbytes(self) -> int:
        """Bytes in the packed layout, its share of them if it is a part: what a product reads."""
        return self.matrix.blob.nbytes * self.shape[0] // self.matrix.shape[0]

    def standard(self) -> Weight:
        """The weight that was packed, on the same device: its codes anew, all else as it was kept."""
        found: Weight
        if isinstance(self.source, PackedExpert):
            assert isinstance(self.selection, str)
            found = getattr(unpack_expert(self.source), self.selection)
        else:
            found = unpack_matrix(self.source)
            if isinstance(self.selection, range):
                found = _some_rows(found, self.selection)
        if self.template is None:
            return found
        assert isinstance(found, (NF4, Int4))
        template = self.template.to(found.device)
        assert isinstance(template, (NF4, Int4))
        return replace(template, codes=found.codes)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]. The whole matrix is unpacked for it."""
        return self.standard().rows(start, stop, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K], as the standard one says: the oracle knows no packed layout."""
        return self.standard().dequantize(dtype)

    def to(self, device: torch.device) -> Weight:
        """Itself where it is; elsewhere the standard weight, which every device multiplies."""
        return self if device == self.device else self.standard().to(device)


class PackedExperts(ExpertSequence):
    """One layer's experts in the packed layout, and the table through which kernels find them."""

    def __init__(
        self,
        packed: Sequence[PackedExpert],
        kept: Sequence[Expert] | None = None,
        table: ExpertTable | None = None,
    ) -> None:
        """Args:
            kept: the experts that were packed; their codes are let go.
            table: where kernels find them, if it is not where `packed` lies.

        Raises:
            UnsupportedError: as ExpertTable.build.
        """
        self.table = table or ExpertTable.build([packed])
        bare = None if kept is None else [_bare(expert) for expert in kept]
        self._made_of = (packed, bare)
        self._experts = [
            _parts(expert, None if bare is None else bare[index])
            for index, expert in enumerate(packed)
        ]

    @classmethod
    def pack(cls, experts: Sequence[Expert]) -> "PackedExperts":
        """Bring a layer's experts into the packed layout where they are.

        Raises:
            UnsupportedError: as pack_expert and ExpertTable.build.
        """
        return cls([pack_expert(expert) for expert in experts], experts)

    @property
    def packed(self) -> Sequence[PackedExpert]:
        """The experts' bytes, and how to read them."""
        return self._made_of[0]

    def elsewhere(self, blobs: Sequence[Tensor], addresses: Tensor) -> "PackedExperts":
        """The same experts with their bytes in `blobs`, found by kernels at `addresses` int64 [1, E]."""
        packed, kept = self._made_of
        moved = [rebased(expert, blob) for expert, blob in zip(packed, blobs, strict=True)]
        table = replace(self.table, addresses=addresses, blobs=[list(blobs)])
        return PackedExperts(moved, kept, table)

    def through(self, addresses: Tensor) -> "PackedExperts":
        """The same experts, found by kernels at other addresses, int64 [1, E]."""
        return PackedExperts(*self._made_of, replace(self.table, addresses=addresses))

    def __reduce__(self) -> tuple[object, ...]:
        """A copy, or what is read back from a pickle, lies elsewhere: its addresses are taken anew."""
        return PackedExperts, self._made_of

    @property
    def device(self) -> torch.device:
        return self.table.addresses.device

    def __len__(self) -> int:
        return len(self._experts)

    def expert(self, index: int) -> Expert:
        return self._experts[index]


def pack(weight: Weight) -> PackedWeight:
    """Bring a matrix into the packed layout where it is.

    Raises:
        UnsupportedError: as pack_matrix.
    """
    return PackedWeight(pack_matrix(weight), None, _without_codes(weight))


def pack_joined(weights: Sequence[Weight]) -> tuple[PackedWeight, tuple[PackedWeight, ...]]:
    """Matrices with the same inputs as one, q, k and v: the whole, and each as a part of it.

    Raises:
        UnsupportedError: as pack_matrix; or they are stored differently.
    """
    whole = pack(_joined(weights))
    assert isinstance(whole.source, PackedMatrix)
    parts, start = [], 0
    for weight in weights:
        rows = range(start, start + weight.shape[0])
        parts.append(PackedWeight(whole.source, rows, _without_codes(weight)))
        start = rows.stop
    return whole, tuple(parts)


def _without_codes(weight: Weight) -> Weight:
    """On the host, with codes of no rows: the number of inputs is still there."""
    assert isinstance(weight, (NF4, Int4))
    none = torch.empty(0, *weight.codes.shape[1:], dtype=torch.uint8)
    return replace(weight, codes=none).to(_HOST)


def _joined(weights: Sequence[Weight]) -> Weight:
    """One weight of all rows."""
    shape = joined([spec_of(weight) for weight in weights]).shape
    first = weights[0]
    if isinstance(first, NF4):
        tables = [weight for weight in weights if isinstance(weight, NF4)]
        blocks = [weight.codes.numel() * 2 // weight.block_size for weight in tables]
        scales = [weight.scales(0, n) for weight, n in zip(tables, blocks, strict=True)]
        return replace(
            first,
            codes=torch.cat([weight.codes for weight in tables]),
            absmax=torch.cat(scales),
            out_shape=shape,
        )
    assert isinstance(first, Int4)
    integers = [weight for weight in weights if isinstance(weight, Int4)]
    for weight in integers:
        if weight.dtype != first.dtype or not same_order(weight.perm, first.perm):
            raise UnsupportedError("matrices that are joined must be stored alike")
    zeros = [weight.zeros for weight in integers if weight.zeros is not None]
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in integers]),
        scales=torch.cat([weight.scales for weight in integers]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def _some_rows(weight: Weight, rows: range) -> Weight:
    """Rows of a weight as it was unpacked; NF4's scales are plain then."""
    part = slice(rows.start, rows.stop)
    if isinstance(weight, NF4):
        assert isinstance(weight.absmax, Tensor)
        codes, scales = (t.view(weight.shape[0], -1)[part] for t in (weight.codes, weight.absmax))
        shape = (len(rows), weight.shape[1])
        return replace(weight, codes=codes.flatten(), absmax=scales.flatten(), out_shape=shape)
    assert isinstance(weight, Int4)
    zeros = None if weight.zeros is None else weight.zeros[part]
    return replace(weight, codes=weight.codes[part], scales=weight.scales[part], zeros=zeros)


def _bare(expert: Expert) -> Expert:
    w1, w2, w3 = (_without_codes(weight) for weight in (expert.w1, expert.w2, expert.w3))
    return Expert(w1=w1, w2=w2, w3=w3)


def _parts(packed: PackedExpert, kept: Expert | None) -> Expert:
    names: tuple[Literal["w1", "w2", "w3"], ...] = ("w1", "w2", "w3")
    w1, w2, w3 = (
        PackedWeight(packed, name, None if kept is None else getattr(kept, name)) for name in names
    )
    return Expert(w1=w1, w2=w2, w3=w3)
