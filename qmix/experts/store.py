"""What layers and the loader know of a store of experts, wherever it keeps them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from qmix.errors import UnsupportedError, UsageError
from qmix.experts.layer_experts import Experts
from qmix.experts.statistics import Statistics
from qmix.kernels import Routes
from qmix.weights.expert import Expert


class Store(ABC):
    """Keeps a model's experts where they fit."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """What the store has done so far. Called between steps."""

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "an offloaded model cannot be copied or pickled",
            remedy="Load it again, or write it with save_pretrained.",
        )


class StoredExperts(Experts):
    """One layer's experts in a store.

    Args:
        at_rest: their weights, as they are described and saved.
    """

    store: Store

    def __init__(self, at_rest: Sequence[Expert]) -> None:
        self._at_rest = at_rest

    def __len__(self) -> int:
        return len(self._at_rest)

    def expert(self, index: int) -> Expert:
        return self._at_rest[index]

    def forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        """See Experts.forward.

        Raises:
            UsageError: gradients are required.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "an offloaded model computes no gradients",
                remedy="Load it without vram= and ram= to train, or use torch.no_grad().",
            )
        return self._forward(x, routes, act)

    @abstractmethod
    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor: ...


def chosen_ids(routes: Routes) -> list[int]:
    """The experts that any token chose, ascending. The host waits for the router."""
    return sorted(set(routes.ids.flatten().tolist()))
