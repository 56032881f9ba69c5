"""The calibration tokens around a layer, and how they are read in batches.

Shape letters: T tokens, S window, D hidden width, n tokens of a batch. Knows nothing of what a
layer does with them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.quantize.calibrated.activations import Activations

BATCH_TOKENS = 4096  # tokens that go through a layer at a time
# Parts of the tokens at most, whose sums are added in order. One process sums the same parts as
# several do, because floating-point sums depend on their order.
_PARTS = 16


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One model's hidden states around a layer: `before` [T, D] is read, `after` [T, D] written."""

    before: Activations
    after: Activations


def batches_of_windows(tokens: int, window: int, batch: int) -> list[range]:
    """The rows of each batch of whole windows, of at most `batch` tokens, in order."""
    step = max(1, batch // window) * window
    return [range(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def summed_parts(batches: Sequence[range]) -> list[list[range]]:
    """Consecutive batches that are summed together."""
    step = -(-len(batches) // _PARTS)
    return [list(batches[start : start + step]) for start in range(0, len(batches), step)]


def read_batches(
    tokens: Activations, batches: Sequence[range], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, D]) of each batch."""
    for batch in batches:
        yield batch.start, tokens.read(batch.start, batch.stop).to(device)


def token_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of several tensors along their first axis, in order."""
    for start in range(0, len(tensors[0]), BATCH_TOKENS):
        yield tuple(tensor[start : start + BATCH_TOKENS] for tensor in tensors)
