"""Where each expert of each layer lies: the table through which the kernels find packed experts.

A kernel gets a layer's row of 64-bit addresses and the router's ids, both on the device; Python
never learns which expert was chosen. An address may point into device memory or into host memory
that the device can read: what a kernel computes does not depend on it.

Shape letters: L layers, E experts. Knows torch only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.weights.packed.layout import PackedExpert
from qmix.weights.packed.tile_format import TileFormat


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """The packed experts of all layers, alike in shape and storage.

    Attributes:
        addresses: int64 [L, E] on the device.
        gate_up: how w1 and w3 are stored; `down`: how w2 is.
        shape: (2F, D), the shape of w1 and w3 packed together; w2 is (D, F).
        blobs: what the addresses point to, so that it stays alive: [L][E].
        perm: int32 [L, E, D], the order in which each expert wants a token's activations, if any
            expert is act-order.
    """

    addresses: Tensor
    gate_up: TileFormat
    down: TileFormat
    shape: tuple[int, int]
    blobs: list[list[Tensor]]
    perm: Tensor | None = None

    @classmethod
    def build(cls, layers: Sequence[Sequence[PackedExpert]]) -> "ExpertTable":
        """The table of experts where they lie now.

        Raises:
            UnsupportedError: the number of experts is no power of two, or experts differ in shape
                or storage.
        """
        first = layers[0][0]
        count = len(layers[0])
        if count & (count - 1):
            raise UnsupportedError(
                "the kernels count experts by powers of two",
                expected="1, 2, 4, 8, ...",
                found=count,
            )
        for index, layer in enumerate(layers):
            for expert in layer:
                alike = (expert.gate_up.format, expert.down.format, expert.gate_up.shape)
                known = (first.gate_up.format, first.down.format, first.gate_up.shape)
                if alike != known:
                    raise UnsupportedError(
                        "the experts of a table must be stored alike",
                        where=f"layer {index}",
                        expected=known,
                        found=alike,
                        remedy="The fallback kernel multiplies such a model.",
                    )
        blobs = [[expert.blob for expert in layer] for layer in layers]
        addresses = [[blob.data_ptr() for blob in row] for row in blobs]
        return cls(
            torch.tensor(addresses, dtype=torch.int64, device=first.blob.device),
            first.gate_up.format,
            first.down.format,
            first.gate_up.shape,
            blobs,
            _perms(layers, first.gate_up.shape[1]),
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
