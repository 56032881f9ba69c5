"""The calibration windows around a layer, shared by the processes that round it.

Each process reads and writes rows of its own in arrays that all of them see. Sums are those of
fixed parts of the windows, added in their order, whatever the number of processes. Shape letters:
S window, D hidden width, n tokens of a batch, K width of what is summed. Knows nothing of what a
layer does with its tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qmix.processes.group import Group
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.token_stream import (
    BATCH_TOKENS,
    TokenStream,
    batches_of_windows,
    read_batches,
    summed_parts,
)
from qmix.quantize.rounding.hessian import Moments

# (first row, inputs in the rounded model, inputs in the unrounded one, if it runs too): some
# windows, of the shape (windows, S, D).
Windows = tuple[int, Tensor, Tensor | None]


class Counted(Protocol):
    """Counts work as batches are taken."""

    def __call__(
        self, batches: Iterator[tuple[int, Tensor]], work: float
    ) -> Iterator[tuple[int, Tensor]]:
        """The batches; `work` is done with each row."""


class SharedWindows:
    """The windows of one layer, as one of the processes has them.

    Args:
        rounded, exact: the tokens of the model that is being rounded, and of the unrounded one.
        window: S.
        device: where batches go.
    """

    def __init__(
        self,
        rounded: TokenStream,
        exact: TokenStream | None,
        window: int,
        device: torch.device,
        group: Group,
        counted: Counted,
    ) -> None:
        self._rounded, self._exact = rounded.before, None if exact is None else exact.before
        self._shape = (-1, window, rounded.before.width)
        self._device, self._group, self._counted = device, group, counted
        self._batches = batches_of_windows(rounded.before.tokens, window, BATCH_TOKENS)

    def read(self, tokens: Activations) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [n, D]) of this process's part of an array."""
        return read_batches(tokens, self._group.share(self._batches), self._device)

    def each(self, work: float) -> Iterator[Windows]:
        """This process's windows; `work` is done with each token."""
        return self._windows(self._group.share(self._batches), work)

    def summed(
        self,
        empty: Callable[[], Moments],
        work: float,
        add: Callable[[Moments, int, Tensor, Tensor | None], None],
    ) -> Moments:
        """The sums over all windows, in every process.

        Args:
            empty: makes sums of nothing.
            work: done with each token.
            add: adds windows to the sums.
        """
        total = empty()
        for mine in self._group.rounds(summed_parts(self._batches)):
            sums = [empty() for _ in mine]
            for part, batches in zip(sums, mine, strict=True):
                for start, x, e in self._windows(batches, work):
                    add(part, start, x, e)
            for part in self._group.gathered(sums):
                total.merge(part)
        return total

    def _windows(self, batches: Sequence[range], work: float) -> Iterator[Windows]:
        for start, x in self._counted(read_batches(self._rounded, batches, self._device), work):
            exact = None
            if self._exact is not None:
                rows = self._exact.read(start, start + len(x))
                exact = rows.to(self._device).view(self._shape)
            yield start, x.view(self._shape), exact
