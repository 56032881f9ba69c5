"""The sum of the unrounded experts' outputs for each token, added in the order of the experts.

Shape letters: T tokens, D width, n tokens of a batch. Knows nothing of how outputs are computed.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qmix.kernels import Routes
from qmix.quantize.calibrated.activations import Activations


class ExpertSum(Protocol):
    """Takes the outputs of one expert after the other, and gives their sums."""

    def add(self, expert: int, tokens: Tensor, first: int, outputs: Tensor) -> None:
        """Take outputs [n, D] of an expert.

        Args:
            tokens: all tokens of the expert, ascending.
            first: which of them the outputs begin with.
        """

    def read(self, start: int, stop: int, routes: Routes) -> Tensor:
        """The sums [stop - start, D] for some tokens."""


class SummedAtOnce:
    """By one process, which has the experts in order.

    Args:
        array: [T, D], zeros.
    """

    def __init__(self, array: Activations) -> None:
        self._array = array

    def add(self, expert: int, tokens: Tensor, first: int, outputs: Tensor) -> None:
        """See `ExpertSum`."""
        self._array.add_rows(tokens[first : first + len(outputs)], outputs)

    def read(self, start: int, stop: int, routes: Routes) -> Tensor:
        """See `ExpertSum`."""
        return self._array.read(start, stop)


class KeptApart:
    """By several processes: a file an expert, since two experts of a token may be added at once.

    Args:
        folder: which all processes see.
        width: D.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width = folder, width

    def add(self, expert: int, tokens: Tensor, first: int, outputs: Tensor) -> None:
        """See `ExpertSum`."""
        path = self._path(expert)
        if first == 0:
            path.unlink(missing_ok=True)
        Activations(len(tokens), self._width, path).write(first, outputs)

    def read(self, start: int, stop: int, routes: Routes) -> Tensor:
        """See `ExpertSum`."""
        total = torch.zeros(stop - start, self._width)
        for expert in range(int(routes.ids.max()) + 1):
            tokens = torch.where(routes.ids == expert)[0]
            first, last = torch.searchsorted(tokens, torch.tensor([start, stop])).tolist()
            if first < last:
                outputs = Activations(len(tokens), self._width, self._path(expert))
                total.index_add_(0, tokens[first:last] - start, outputs.read(first, last))
        return total

    def _path(self, expert: int) -> Path:
        return self._folder / f"outputs-{expert:05d}.writing"


def remove_outputs(folder: Path) -> None:
    """Remove the files of `KeptApart`."""
    for path in folder.glob("outputs-*.writing"):
        path.unlink()
