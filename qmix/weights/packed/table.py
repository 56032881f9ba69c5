"""The table of addresses through which kernels find packed experts.

A kernel gets a layer's row of 64-bit addresses and the router's ids, both on the device; Python
never learns which expert was chosen. An address may point into device memory or into host memory
that the device can read; the result of a kernel does not depend on it.

Knows torch, and no kernel. Shape letters: see qmix.kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights.packed.layout import PackedExpert
from qmix.weights.packed.packed_shapes import table_format
from qmix.weights.packed.tile_format import TileFormat


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """The packed experts of one or more layers, alike in shape and storage.

    Attributes:
        addresses: int64 [layers, E] on the device.
        gate_up: the format of w1 and w3.
        down: the format of w2.
        shape: (2F, D), the shape of w1 and w3 packed together; w2 is (D, F).
        blobs: [layers][E], what the addresses point to, kept alive here.
        perm: int32 [layers, E, D], the order in which each expert wants a token's activations; None
            if no expert is act-order.
    """

    addresses: Tensor
    gate_up: TileFormat
    down: TileFormat
    shape: tuple[int, int]
    blobs: list[list[Tensor]]
    perm: Tensor | None = None

    @classmethod
    def build(cls, layers: Sequence[Sequence[PackedExpert]]) -> "ExpertTable":
        """The table of experts at their current addresses.

        Raises:
            UnsupportedError: the number of experts is no power of two, or experts differ in shape
                or storage.
        """
        shared = table_format([[expert.format for expert in layer] for layer in layers])
        device = layers[0][0].blob.device
        blobs = [[expert.blob for expert in layer] for layer in layers]
        addresses = [[blob.data_ptr() for blob in row] for row in blobs]
        return cls(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            shared.gate_up,
            shared.down,
            shared.shape,
            blobs,
            _perms(layers, shared.shape[1]),
        )

    @property
    def down_offset(self) -> int:
        """Bytes from the start of an expert to its w2."""
        return self.gate_up.matrix_bytes(self.shape)


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
