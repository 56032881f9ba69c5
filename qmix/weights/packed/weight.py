"""Weights in the packed layout, as the models hold them.

The codes lie on the device, packed. Packing rounds the scales, and a file wants zeros, nested
scales and the order of the inputs too: these stay on the host as they were, 2 % of the bytes.
`unpack` puts both together and gives the weight that was packed, bit for bit. A weight that was
drawn at random in the packed layout has nothing on the host; its scales are those of the kernels.

Knows torch, and no kernel. Shape letters: see qmix.kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert, ExpertSequence
from qmix.weights.packed.layout import (
    PackedExpert,
    PackedMatrix,
    format_of,
    pack_expert,
    pack_matrix,
    unpack_expert,
    unpack_matrix,
    with_blob,
)
from qmix.weights.packed.packed_shapes import table_formats
from qmix.weights.packed.planes import with_codes_of
from qmix.weights.packed.table import ExpertTable
from qmix.weights.scheme import Scheme
from qmix.weights.stacked import Stacked
from qmix.weights.table import Table

# A matrix of an expert by its name; one of joined matrices, or of a padded one, by its rows.
Selection = Literal["w1", "w2", "w3"] | range

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [N, K] in the packed layout: a matrix, some of its rows, or a matrix of an expert.

    Attributes:
        source: the packed codes and scales.
        selection: which matrix of the expert, or which rows of the matrix; None is all of it.
        template: the weight that was packed, without its codes and on the host; None if it was
            drawn at random.
        parts: the weights that were packed as one, in the place of a template.
    """

    source: PackedMatrix | PackedExpert
    selection: Selection | None
    template: Weight | None
    parts: "tuple[PackedWeight, ...]" = ()

    @property
    def matrix(self) -> PackedMatrix:
        """The matrix that holds it; w1 and w3 of an expert share one of twice the rows."""
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
        if self.parts:
            return self.parts[0].scheme
        if self.template is not None:
            return self.template.scheme
        tile_format, group = self.matrix.format, self.matrix.group
        if tile_format.table is not None:
            return Scheme(kind=tile_format.table, block_size=group, double_quant=False)
        return Scheme(kind=tile_format.kind, group_size=group, symmetric=tile_format.symmetric)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.blob.device

    @property
    def nbytes(self) -> int:
        """The packed bytes, headers in proportion: what a matmul reads."""
        return self.matrix.blob.nbytes * self.shape[0] // self.matrix.shape[0]

    def unpack(self) -> Weight:
        """The weight that was packed, on the same device."""
        if isinstance(self.source, PackedExpert):
            assert isinstance(self.selection, str)
            return self._restored(getattr(unpack_expert(self.source), self.selection))
        whole = unpack_matrix(self.source)
        if self.parts:
            return Stacked(tuple(part._restored(whole) for part in self.parts))
        return self._restored(whole)

    def _restored(self, unpacked: Weight) -> Weight:
        """The weight with the codes of what was unpacked, its source or matrix of an expert."""
        if isinstance(self.selection, range):
            unpacked = _some_rows(unpacked, self.selection)
        if self.template is None:
            return unpacked
        return with_codes_of(self.template.to(unpacked.device), unpacked, self.matrix.format)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]; unpacks the whole matrix."""
        return self.unpack().rows(start, stop, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K] as it was before packing: the oracle knows no packed layout."""
        return self.unpack().dequantize(dtype)

    def to(self, device: torch.device) -> Weight:
        """Itself on its own device, unpacked on another one: every device can use that."""
        return self if device == self.device else self.unpack().to(device)


class PackedExperts(ExpertSequence):
    """One layer's experts in the packed layout, and the table through which kernels find them."""

    def __init__(
        self,
        packed: Sequence[PackedExpert],
        templates: Sequence[Expert] | None = None,
        table: ExpertTable | None = None,
    ) -> None:
        """A layer's experts.

        Args:
            templates: the experts that were packed, without their codes and on the host.
            table: the addresses that kernels read; None takes those of `packed`.

        Raises:
            UnsupportedError: as ExpertTable.build.
        """
        self.packed = packed
        self.table = table or ExpertTable.build([packed])
        self._templates = templates
        self._experts = [
            _packed_expert(expert, None if self._templates is None else self._templates[index])
            for index, expert in enumerate(packed)
        ]

    @classmethod
    def pack(
        cls, experts: Sequence[Expert], release: Callable[[int], None] = lambda _: None
    ) -> "PackedExperts":
        """Pack a layer's experts on their own device, one after another.

        Args:
            release: is called with each expert's index once it is packed, and may free its memory.

        Raises:
            UnsupportedError: as pack_expert and ExpertTable.build; nothing is released then.
        """
        table_formats([[format_of(experts[index]) for index in range(len(experts))]])
        packed, templates = [], []
        for index in range(len(experts)):
            packed.append(pack_expert(experts[index]))
            templates.append(_expert_without_codes(experts[index]))
            release(index)
        return cls(packed, templates)

    def moved_to(self, blobs: Sequence[Tensor], addresses: Tensor) -> "PackedExperts":
        """The experts with their bytes in `blobs`, read by kernels at `addresses`, int64 [1, E]."""
        moved = [with_blob(expert, blob) for expert, blob in zip(self.packed, blobs, strict=True)]
        table = replace(self.table, addresses=addresses, blobs=[list(blobs)])
        return PackedExperts(moved, self._templates, table)

    def with_addresses(self, addresses: Tensor) -> "PackedExperts":
        """The same experts; kernels read them at other addresses, int64 [1, E]."""
        table = replace(self.table, addresses=addresses)
        return PackedExperts(self.packed, self._templates, table)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and unpickled experts lie at other addresses, which are looked up anew."""
        return PackedExperts, (self.packed, self._templates)

    @property
    def device(self) -> torch.device:
        return self.table.addresses.device

    def __len__(self) -> int:
        return len(self._experts)

    def expert(self, index: int) -> Expert:
        return self._experts[index]


def pack(weight: Weight) -> PackedWeight:
    """Pack a matrix on its own device.

    Raises:
        UnsupportedError: as pack_matrix.
    """
    matrix, rows = pack_matrix(weight), weight.shape[0]
    selection = None if matrix.shape[0] == rows else range(rows)
    return PackedWeight(matrix, selection, _without_codes(weight))


def pack_joined(weights: Sequence[Weight]) -> tuple[PackedWeight, tuple[PackedWeight, ...]]:
    """Pack matrices with the same inputs (q, k and v) as one: the whole, and each as rows of it.

    Raises:
        UnsupportedError: as pack_matrix.
    """
    matrix = pack_matrix(*weights)
    parts, start = [], 0
    for weight in weights:
        rows = range(start, start + weight.shape[0])
        parts.append(PackedWeight(matrix, rows, _without_codes(weight)))
        start = rows.stop
    return PackedWeight(matrix, None, None, tuple(parts)), tuple(parts)


def _without_codes(weight: Weight) -> Weight:
    """The weight on the host, with codes of no rows; they still tell the number of inputs."""
    assert isinstance(weight, (Table, Affine))
    no_codes = torch.empty(0, *weight.codes.shape[1:], dtype=torch.uint8)
    return replace(weight, codes=no_codes).to(_HOST)


def _some_rows(weight: Weight, rows: range) -> Weight:
    """Some rows of an unpacked weight, whose scales are not nested."""
    part = slice(rows.start, rows.stop)
    if isinstance(weight, Table):
        assert isinstance(weight.scales, Tensor)
        count, inputs = weight.shape
        size = weight.block_size
        blocks = slice(rows.start * inputs // size, -(-rows.stop * inputs // size))
        codes = weight.codes.view(count, -1)[part].flatten()
        return replace(
            weight, codes=codes, scales=weight.scales[blocks], out_shape=(len(rows), inputs)
        )
    assert isinstance(weight, Affine)
    assert isinstance(weight.scales, Tensor)
    zeros = None if weight.zeros is None else weight.zeros[part]
    return replace(weight, codes=weight.codes[part], scales=weight.scales[part], zeros=zeros)


def _expert_without_codes(expert: Expert) -> Expert:
    w1, w2, w3 = (_without_codes(weight) for weight in (expert.w1, expert.w2, expert.w3))
    return Expert(w1=w1, w2=w2, w3=w3)


def _packed_expert(packed: PackedExpert, template: Expert | None) -> Expert:
    names: tuple[Literal["w1", "w2", "w3"], ...] = ("w1", "w2", "w3")
    w1, w2, w3 = (
        PackedWeight(packed, name, None if template is None else getattr(template, name))
        for name in names
    )
    return Expert(w1=w1, w2=w2, w3=w3)
