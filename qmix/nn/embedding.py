"""The embedding: rows of a weight of any kind, which may be the head's too.

Knows no bits: rows are taken from the weight as it is stored. Shape letters: see qmix.nn.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix.errors import UsageError
from qmix.nn.process import capturing
from qmix.nn.stored import StoredModule
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense, Weight
from qmix.weights.table import Table


class Embedding(StoredModule, nn.Embedding):  # type: ignore[misc]  # its weight may be None
    """Ids to rows of a weight [V, D]: a trainable parameter when dense."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        # Without torch's default initialisation, on whatever device is being built on.
        super().__init__(
            num_embeddings, embedding_dim, _weight=torch.empty(num_embeddings, embedding_dim)
        )
        self._dtype = torch.get_default_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self._dtype if self.weight is None else self.weight.dtype

    def store(self, weight: Weight, dtype: torch.dtype | None = None) -> None:
        """Replace the weight; the shape [V, D] must stay.

        Args:
            dtype: of the rows; default: the weight's.
        """
        assert weight.shape == (self.num_embeddings, self.embedding_dim), weight.shape
        super().store(weight)
        self._dtype = dtype or weight.dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids of any shape -> [..., D]."""
        return _rows(input_ids, self.stored, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._packed is not None:  # the rows follow a change of dtype, as activations do
            probe = fn(torch.empty(0, dtype=self._dtype, device=self._packed.device))
            self._dtype = probe.dtype
        return self


def embedding(input_ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding [V, D] in `dtype` for ids of any shape: [..., D].

    Raises:
        UsageError: an id outside the vocabulary.
    """
    check_ids(input_ids, weight.shape[0])
    return _rows(input_ids, weight, dtype)


def _rows(input_ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Dense):
        return F.embedding(input_ids, weight.data).to(dtype)
    assert isinstance(weight, Affine | Table), type(weight)
    rows = weight.take(input_ids.reshape(-1).to(weight.device, torch.int64))
    return rows.dequantize(dtype).view(*input_ids.shape, -1)


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that an embedding of so many rows does not have.

    Ids on a GPU are waited for: one that is wrong there would end all work of the process on it.

    Raises:
        UsageError: an id outside the vocabulary.
    """
    if input_ids.numel() and not capturing(input_ids):
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            raise UsageError(
                "token id outside the vocabulary",
                where="input_ids",
                expected=f"0 to {vocabulary - 1}",
                found=low if low < 0 else high,
            )
