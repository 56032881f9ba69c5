"""A module whose weight has any form: a trainable parameter when dense, else as it is packed.

Knows no bits. What the module does with its weight is its own affair.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qmix.errors import UsageError
from qmix.weights import huge_pages
from qmix.weights.dense import Dense, Weight


class StoredModule(nn.Module):
    """A module with one weight [N, K] of any kind.

    `weight` is None while a packed weight is stored; `stored` is the Weight in either case.
    """

    weight: nn.Parameter | None
    _packed: Weight | None = None

    @property
    def stored(self) -> Weight:
        """The weight, dense or packed."""
        if self._packed is not None:
            return self._packed
        assert self.weight is not None
        return Dense(self.weight)

    def store(self, weight: Weight) -> None:
        """Replace the weight; its shape must stay. In host memory it moves to huge pages."""
        huge_pages.gather(weight)
        if isinstance(weight, Dense):
            self.weight = nn.Parameter(weight.data)
            self._packed = None
        else:
            self.weight = None
            self._packed = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._packed is not None:
            # Codes and scales follow the device; a change of dtype must not round the scales.
            probe = fn(torch.empty(0, device=self._packed.device))
            self._packed = self._packed.to(probe.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self._packed is not None:
            raise UsageError(
                "a packed weight does not fit a state_dict",
                where=f"{prefix}weight",
                remedy="Use save_pretrained, which writes packed weights too.",
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
