"""What layers and the loader know of a store of experts, wherever it keeps them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from torch import Tensor

from qmix.errors import UnsupportedError, UsageError
from qmix.experts.layer_experts import Experts
from qmix.experts.statistics import Statistics
from qmix.experts.turns import Turns
from qmix.kernels import Routes
from qmix.kernels.gradients import needs_grad
from qmix.weights.expert import Expert

Result = TypeVar("Result")


class Store(ABC):
    """Keeps a model's experts where they fit.

    Several threads may use it: a pass through a model's layers is a step, and steps take turns.
    """

    def __init__(self) -> None:
        self._turns = Turns()

    def in_turn(self, step: Callable[[], Result]) -> Result:
        """Run a step when no other thread's is under way; see Turns.take."""
        return self._turns.take(self._begin_step, step)

    def statistics(self) -> Statistics:
        """What the store has done so far, between two steps."""
        return self.in_turn(self._statistics)

    @abstractmethod
    def _statistics(self) -> Statistics: ...

    @abstractmethod
    def _begin_step(self, whole: bool) -> None:
        """Called before each step.

        Args:
            whole: the step before ended; if not, it must be cleared away first.
        """

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
        if needs_grad(x):
            raise UsageError(
                "an offloaded model computes no gradients",
                remedy="Load it without vram= and ram= to train, or use torch.no_grad().",
            )
        return self.store.in_turn(lambda: self._forward(x, routes, act))

    @abstractmethod
    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor: ...


def chosen_ids(routes: Routes) -> list[int]:
    """The experts that any token chose, ascending. The host waits for the router."""
    return sorted(set(routes.ids.flatten().tolist()))
