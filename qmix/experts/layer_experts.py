"""One layer's experts, and the one door through which a layer multiplies them: `Experts.forward`.

Each kind of experts knows which kernels multiply it. Those of a store are in `store` and above.
"""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from qmix import kernels
from qmix.kernels import PackedExperts, Routes
from qmix.weights.expert import Expert, ExpertSequence


class Experts(ExpertSequence):
    """One layer's experts, wherever they are. Indexed, they can be described and saved."""

    @abstractmethod
    def forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Each token through its chosen experts: [T, D] -> [T, D], summed in float32."""

    @property
    def packed(self) -> PackedExperts | None:
        """What a recorded step multiplies; None if a step needs the host or other kernels."""
        return None


class ResidentExperts(Experts):
    """Experts in standard layouts that all stay in memory.

    Args:
        get: the weights of an expert, as they are now.
    """

    def __init__(self, count: int, get: Callable[[int], Expert]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    def expert(self, index: int) -> Expert:
        return self._get(index)

    def forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        return kernels.experts(x, routes, self, act)


class GpuExperts(Experts):
    """Experts in the packed layout, all of them in a GPU's memory."""

    def __init__(self, packed: PackedExperts) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def expert(self, index: int) -> Expert:
        return self._packed[index]

    @property
    def packed(self) -> PackedExperts:
        return self._packed

    def forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        return kernels.packed_experts(x, routes, self._packed, act)
