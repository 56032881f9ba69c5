"""The calibration tokens around a layer, and how they are read in batches.

Shape letters: T tokens, S window, D hidden width, n tokens of a batch. Knows nothing of what a
layer does with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.quantize.calibrated.activations import Activations

BATCH_TOKENS = 4096  # tokens that go through a layer at a time


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One model's hidden states around a layer: `before` [T, D] is read, `after` [T, D] written."""

    before: Activations
    after: Activations


def window_batches(
    tokens: Activations, seqlen: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, D]) of whole windows, in order."""
    step = max(1, BATCH_TOKENS // seqlen) * seqlen
    for start in range(0, tokens.tokens, step):
        rows = tokens.read(start, min(start + step, tokens.tokens))
        yield start, rows.to(device)


def token_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of several tensors along their first axis, in order."""
    for start in range(0, len(tensors[0]), BATCH_TOKENS):
        yield tuple(tensor[start : start + BATCH_TOKENS] for tensor in tensors)
