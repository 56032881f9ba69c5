"""Where each expert's bytes come from, and where kernels find them: host blobs, slots, addresses.

Knows no layer, no step and no policy.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qmix.experts.arena import SlotArena
from qmix.experts.copiers import Copier, FinishedCopy, PendingCopy
from qmix.experts.residency import Residency

# Writes an expert that is not in host memory into a blob of the device.
Fill = Callable[[int, Tensor], None]


class ExpertSources:
    """Copies experts to the device from host memory, or else from their file.

    Args:
        blobs: each expert's blob in host memory; None if it is only in the file.
        sizes: bytes of each expert.
        fill: reads an expert from the file; needed if a blob is None.
    """

    def __init__(
        self,
        blobs: Sequence[Tensor | None],
        sizes: Sequence[int],
        copier: Copier,
        fill: Fill | None = None,
    ) -> None:
        self.blobs, self._sizes, self._copier, self._fill = blobs, sizes, copier, fill

    def __len__(self) -> int:
        return len(self.blobs)

    @property
    def on_host(self) -> int:
        """The number of experts in host memory."""
        return sum(blob is not None for blob in self.blobs)

    def nbytes(self, experts: Iterable[int]) -> int:
        """The bytes of experts together."""
        return sum(self._sizes[expert] for expert in experts)

    def copy(self, expert: int, slot: Tensor) -> PendingCopy:
        """Start to copy an expert to the beginning of a slot."""
        blob, target = self.blobs[expert], slot[: self._sizes[expert]]
        if blob is not None:
            return self._copier.copy(blob, target)
        assert self._fill is not None
        self._fill(expert, target)
        return FinishedCopy()


class AddressTable:
    """The device's table of expert addresses: the slot, or the host blob if the device can read it.

    Args:
        addresses: int64 [layers, E] on the device, written by `write`.
        host: where the device reads each expert in host memory; None: it cannot, and an expert
            without a slot has the address 0.
    """

    def __init__(
        self,
        addresses: Tensor,
        host: Sequence[int] | None,
        slots: SlotArena,
        residency: Residency,
        copier: Copier,
    ) -> None:
        assert host is None or len(host) == addresses.numel()
        self.addresses, self._host = addresses, host
        self._slots, self._residency = slots, residency
        self._copier = copier
        self._written_slots = list(residency.slot_of_id)
        self._written = [self.address(expert) for expert in range(addresses.numel())]
        self._upload()

    def address(self, expert: int) -> int:
        """Where the device reads an expert now."""
        slot = self._residency.slot_of_id[expert]
        if slot >= 0:
            return self._slots.address(slot)
        return 0 if self._host is None else self._host[expert]

    def write(self) -> None:
        """Bring the device's table up to date, in order with the device's work.

        Runs once or twice a token, mostly with nothing to do.
        """
        slots = self._residency.slot_of_id
        if slots == self._written_slots:
            return
        for expert, (slot, before) in enumerate(zip(slots, self._written_slots, strict=True)):
            if slot != before:
                self._written[expert] = self.address(expert)
        self._upload()
        self._written_slots = list(slots)

    def _upload(self) -> None:
        self._copier.write(torch.tensor(self._written).view(self.addresses.shape), self.addresses)

    def row(self, addresses: Sequence[int]) -> Tensor:
        """A table of one layer on the device, int64 [1, E], beside the real one."""
        row = torch.empty(1, len(addresses), dtype=torch.int64, device=self.addresses.device)
        self._copier.write(torch.tensor([addresses]), row)
        return row
