"""The table of addresses through which kernels find packed experts.

A kernel gets a layer's row of 64-bit addresses and the router's ids, both on the device; Python
never learns which expert was chosen. An address may point into device memory or into host memory
that the device can read; the result of a kernel does not depend on it.

Knows torch, and no kernel. Shape letters: see qmix.kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qmix.weights.packed.layout import PackedExpert
from qmix.weights.packed.packed_shapes import ExpertFormat, table_formats
from qmix.weights.packed.tile_format import TileFormat


@dataclass(frozen=True, eq=False)
class TableForm:
    """The experts of a table whose matrices, w1 with w3 or w2, have one format.

    Attributes:
        count: how many experts these are.
        addresses: int64 [layers, E] on the device, those of the table, which a store changes.
        offset: bytes from an address to the matrix.
        members: int64 [E] on the device, an expert's own number, or E if it has another format;
            None: all experts have this one.
        offsets: int64 [E] on the device, in the place of `offset` where experts differ in it.
    """

    format: TileFormat
    count: int
    addresses: Tensor
    offset: int
    members: Tensor | None = None
    offsets: Tensor | None = None

    def at(self, layer: int) -> Tensor:
        """Where a layer's experts lie now, int64 [E], without `offset`."""
        row = self.addresses[layer]
        return row if self.offsets is None else row + self.offsets


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """The packed experts of one or more layers, alike in shape.

    Attributes:
        addresses: int64 [layers, E] on the device.
        formats: of each expert, the same in all layers.
        blobs: [layers][E], what the addresses point to, kept alive here.
        perm: int32 [layers, E, D], the order in which each expert wants a token's activations; None
            if no expert is act-order.
    """

    addresses: Tensor
    formats: tuple[ExpertFormat, ...]
    blobs: list[list[Tensor]]
    perm: Tensor | None = None

    @classmethod
    def build(cls, layers: Sequence[Sequence[PackedExpert]]) -> "ExpertTable":
        """The table of experts at their current addresses.

        Raises:
            UnsupportedError: the number of experts is no power of two, experts differ in shape, or
                layers in format.
        """
        formats = table_formats([[expert.format for expert in layer] for layer in layers])
        device = layers[0][0].blob.device
        blobs = [[expert.blob for expert in layer] for layer in layers]
        addresses = [[blob.data_ptr() for blob in row] for row in blobs]
        return cls(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            formats,
            blobs,
            _perms(layers, formats[0].shape[1]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(2F, D), the shape of w1 and w3 packed together; w2 is (D, F)."""
        return self.formats[0].shape

    def down_offset(self, expert: int) -> int:
        """Bytes from the start of an expert to its w2."""
        return self.formats[expert].gate_up.matrix_bytes(self.shape)

    @cached_property
    def gate_up(self) -> tuple[TableForm, ...]:
        """The forms of w1 with w3."""
        return self._forms([of.gate_up for of in self.formats], [0] * len(self.formats))

    @cached_property
    def down(self) -> tuple[TableForm, ...]:
        """The forms of w2."""
        offsets = [self.down_offset(expert) for expert in range(len(self.formats))]
        return self._forms([of.down for of in self.formats], offsets)

    def _forms(self, found: Sequence[TileFormat], offsets: Sequence[int]) -> tuple[TableForm, ...]:
        """Experts with one format together; `found` and `offsets` tell both of each expert."""
        offset, apart = offsets[0], None
        if len(set(offsets)) > 1:
            offset, apart = 0, self.addresses.new_tensor(offsets)
        if len(set(found)) == 1:
            return (TableForm(found[0], len(found), self.addresses, offset, offsets=apart),)
        forms = []
        for each in dict.fromkeys(found):
            ids = [expert if of == each else len(found) for expert, of in enumerate(found)]
            members = self.addresses.new_tensor(ids)
            forms.append(TableForm(each, found.count(each), self.addresses, offset, members, apart))
        return tuple(forms)


def _perms(layers: Sequence[Sequence[PackedExpert]], hidden: int) -> Tensor | None:
    if all(expert.gate_up.perm is None for layer in layers for expert in layer):
        return None
    device = layers[0][0].blob.device
    in_order = torch.arange(hidden, dtype=torch.int32, device=device)
    rows = [
        torch.stack([in_order if e.gate_up.perm is None else e.gate_up.perm.int() for e in layer])
        for layer in layers
    ]
    return torch.stack(rows)
