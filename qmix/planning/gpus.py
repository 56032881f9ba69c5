"""Graphics cards by their data sheets: memory, its bandwidth, the interconnect to the host.

Facts with their sources, for a card that is not in this machine. Knows nothing of what is measured:
`qmix doctor --measure` is for the card that is.
"""

import re
from dataclasses import dataclass

from qmix.errors import UsageError

# Host to device, bytes a second, of pinned memory over 16 lanes. PCIe 4: 23.8 measured on a 3090
# (FlashML-org/FreeToken#281), 25 as the round figure of reference/offload.md, section 3. Other
# generations by their ratio; 5 on an H100's host was 51 (kekzl/imp#1377).
PCIE_BANDWIDTH = {3: 12.5e9, 4: 25e9, 5: 50e9}
# What reading reaches of a data sheet's bandwidth: 854 of the 3090's 936 GB/s (ashalliants/ninfer-3090#50).
READ_SHARE = 0.91
# The kernels are compiled for 8.0, 8.6, 8.9 and 9.0; older matrix units lack their instruction.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
        name: as `--card` takes it.
        vram: bytes that the driver reports as total (nvidia-smi).
        nominal: GB on the box.
        bandwidth: bytes a second of the data sheet.
        pcie: generation of its interconnect, 16 lanes.
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
        """Bytes a second that a kernel may reach: the data sheet's times READ_SHARE."""
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


# By memory; of one size the slowest first, which stands for a bare `--vram`.
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


# Kinds of one name, by the words in which their drivers differ.
_DRIVER_WORDS = {
    "A100-80": {"a100", "80gb"},
    "A100-40": {"a100"},
    "H100-PCIe": {"h100", "pcie"},
}


def find(name: str) -> Card:
    """The card of a name as people write it: "3090", "rtx-4090", "a100-40", "NVIDIA L40S".

    Raises:
        UsageError: none or several fit.
    """
    wanted = _plain(name)
    exact = [card for card in CARDS if wanted == _plain(card.name)]
    fitting = exact or [card for card in CARDS if wanted and wanted in _plain(card.name)]
    if len(fitting) != 1:
        raise UsageError(
            "no such card" if not fitting else "which card?",
            where="--card",
            expected="one of " + ", ".join(card.name for card in fitting or CARDS),
            found=name,
            remedy="Give --vram for another one." if not fitting else None,
        )
    return fitting[0]


def known(device: str) -> Card | None:
    """The card that a driver's name speaks of ("NVIDIA GeForce RTX 3090"); None if it is not listed."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    if "laptop" in words:
        return None
    for name, wanted in _DRIVER_WORDS.items():
        if wanted <= words:
            return find(name)
    return next((card for card in CARDS if card.name.lower().split()[-1] in words), None)


def of_size(vram: int) -> Card:
    """What stands for a card of which only the memory is known: a supported one of the nearest size."""
    usual = ("RTX 3060", "RTX 4080", "RTX 3090", "RTX 5090", "A100-40", "A6000", "A100-80", "H200")
    return min(
        (card for card in CARDS if card.name in usual),
        key=lambda card: abs(card.nominal * 2**30 - vram),
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().removeprefix("nvidia") if c.isalnum())
