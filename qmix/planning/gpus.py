"""GPUs by their data sheets: memory, its bandwidth, and the PCIe generation.

For planning with a GPU that is not in this machine; `qmix doctor --measure` measures one that is.
Knows nothing of measurements.
"""

import re
from dataclasses import dataclass

from qmix.errors import UsageError
from qmix.instruction_sets import LEAST_CAPABILITY

# Bytes a second from pinned host memory to the device over 16 lanes, by PCIe generation. PCIe 4:
# 23.8 GB/s was measured on a 3090 (github.com/FlashML-org/FreeToken/issues/281), rounded to 25. The
# others follow by ratio; on the host of an H100 51 GB/s was measured
# (github.com/kekzl/imp/issues/1377).
PCIE_BANDWIDTH = {3: 12.5e9, 4: 25e9, 5: 50e9}
# The share of a data sheet's bandwidth that reading reaches: 854 of the 3090's 936 GB/s
# (github.com/ashalliants/ninfer-3090/issues/50).
READ_SHARE = 0.91


@dataclass(frozen=True)
class Card:
    """One model of GPU.

    Attributes:
        name: as `--card` takes it.
        vram: the total that the driver reports (nvidia-smi), in bytes.
        nominal: the memory it is sold with, in GB.
        bandwidth: of its memory by the data sheet, bytes a second.
        pcie: the generation of its interconnect, with 16 lanes.
        capability: CUDA compute capability.
        source: of bandwidth and generation.
    """

    name: str
    vram: int
    nominal: int
    bandwidth: float
    pcie: int
    capability: tuple[int, int]
    source: str

    @property
    def read_bandwidth(self) -> float:
        """Bytes a second that a kernel can reach, the data sheet's times READ_SHARE."""
        return READ_SHARE * self.bandwidth

    @property
    def interconnect(self) -> float:
        """Bytes a second from pinned host memory."""
        return PCIE_BANDWIDTH[self.pcie]

    @property
    def supported(self) -> bool:
        """Whether the 4-bit kernels run on it."""
        return self.capability >= LEAST_CAPABILITY


def _card(
    name: str, mib: int, nominal: int, bandwidth: float, pcie: int, capability: tuple[int, int]
) -> Card:
    return Card(
        name, mib << 20, nominal, bandwidth * 1e9, pcie, capability, f"NVIDIA's data sheet: {name}"
    )


# By memory, and by speed within one size.
CARDS: tuple[Card, ...] = (
    _card("RTX 3060", 12288, 12, 360, 4, (8, 6)),
    _card("T4", 15360, 16, 320, 3, (7, 5)),
    _card("RTX 4080", 16376, 16, 716.8, 4, (8, 9)),
    _card("L4", 23034, 24, 300, 4, (8, 9)),
    _card("RTX 3090", 24576, 24, 936, 4, (8, 6)),
    _card("RTX 4090", 24564, 24, 1008, 4, (8, 9)),
    _card("RTX 5090", 32607, 32, 1792, 5, (12, 0)),
    _card("A100-40", 40960, 40, 1555, 4, (8, 0)),
    _card("A6000", 49140, 48, 768, 4, (8, 6)),
    _card("L40S", 46068, 48, 864, 4, (8, 9)),
    _card("A100-80", 81920, 80, 2039, 4, (8, 0)),
    _card("H100-PCIe", 81559, 80, 2039, 5, (9, 0)),
    _card("H100", 81559, 80, 3350, 5, (9, 0)),
    _card("H200", 143771, 141, 4800, 5, (9, 0)),
)


# Models that share a name, by the words in which their drivers differ.
_DRIVER_WORDS = {
    "A100-80": {"a100", "80gb"},
    "A100-40": {"a100"},
    "H100-PCIe": {"h100", "pcie"},
}


def find(name: str) -> Card:
    """The GPU of a name as people write it: "3090", "rtx-4090", "a100-40", "NVIDIA L40S".

    Raises:
        UsageError: the name fits no GPU of the list, or several.
    """
    plain = _plain(name)
    exact = [card for card in CARDS if plain == _plain(card.name)]
    matches = exact or [card for card in CARDS if plain and plain in _plain(card.name)]
    if len(matches) != 1:
        raise UsageError(
            "ambiguous GPU name" if matches else "unknown GPU",
            where="--card",
            expected="one of " + ", ".join(card.name for card in matches or CARDS),
            found=name,
            remedy=None if matches else "Give --vram for another GPU.",
        )
    return matches[0]


def known(device: str) -> Card | None:
    """The GPU that a driver names ("NVIDIA GeForce RTX 3090"); None if it is not in the list."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    if "laptop" in words:
        return None
    for name, driver_words in _DRIVER_WORDS.items():
        if driver_words <= words:
            return find(name)
    return next((card for card in CARDS if card.name.lower().split()[-1] in words), None)


def of_size(vram: int) -> Card:
    """The GPU to assume if only its memory is known: a common one of the nearest size."""
    usual = ("RTX 3060", "RTX 4080", "RTX 3090", "RTX 5090", "A100-40", "A6000", "A100-80", "H200")
    return min(
        (card for card in CARDS if card.name in usual),
        key=lambda card: abs(card.nominal * 2**30 - vram),
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().removeprefix("nvidia") if c.isalnum())
