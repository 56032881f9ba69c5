"""What GPTQ needs to know of a matrix's inputs: their second moments, and how many there were.

On a GPU the products are of TensorFloat-32 numbers, in which bfloat16 inputs are exact; their sums
are float32. Shape letters: K inputs of the matrix, n tokens of one call. Knows nothing of weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qmix.planning.quantize_cost import SYMMETRIC_PANEL


class Moments:
    """Running sums of `t x x^T` and `t e x^T` over the inputs x of a matrix.

    t is the weight of the token, and e is what the unrounded model has in place of x.

    Args:
        width: K.
        device: where the sums are kept, in float32.
        crossed: whether to keep the second sum.

    Attributes:
        hessian: [K, K], the first sum.
        cross: [K, K], the second sum; None unless crossed.
        tokens: number of inputs added so far, whatever their weights.
    """

    def __init__(self, width: int, device: torch.device, *, crossed: bool) -> None:
        self.hessian = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device) if crossed else None
        self.tokens = 0
        self._weight_sum = self._square_sum = 0.0

    def add(
        self, inputs: Tensor, token_weights: Tensor | None = None, *, exact: Tensor | None = None
    ) -> None:
        """Add inputs [..., K].

        Args:
            token_weights: [n], how much each token counts; None counts every token as 1.
            exact: the unrounded model's inputs, of the shape of `inputs`; required if crossed.
        """
        width = self.hessian.shape[0]
        rows = inputs.reshape(-1, width).float()
        exact_rows = None if exact is None else exact.reshape(-1, width).float()
        self.tokens += len(rows)
        if token_weights is None:
            self._weight_sum += len(rows)
            self._square_sum += len(rows)
        else:
            self._weight_sum += float(token_weights.sum())
            self._square_sum += float(token_weights.square().sum())
            root = token_weights.sqrt()[:, None]
            rows, exact_rows = rows * root, None if exact_rows is None else exact_rows * root
        assert (exact_rows is None) == (self.cross is None)
        add_symmetric(self.hessian, rows)
        if self.cross is not None and exact_rows is not None:
            with _tensor_cores(rows.device):
                self.cross.addmm_(exact_rows.T, rows)

    def merge(self, other: "Moments") -> None:
        """Add the sums over other inputs of the same matrix."""
        self.hessian += other.hessian
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        self.tokens += other.tokens
        self._weight_sum += other._weight_sum
        self._square_sum += other._square_sum

    @property
    def samples(self) -> float:
        """The number of equally weighted inputs worth as much (Kish's effective sample size)."""
        return self._weight_sum**2 / self._square_sum if self._square_sum else 0.0

    def copy(self) -> "Moments":
        """An independent copy, sums included."""
        duplicate = Moments.__new__(Moments)
        duplicate.__dict__.update(self.__dict__)
        duplicate.hessian = self.hessian.clone()
        duplicate.cross = None if self.cross is None else self.cross.clone()
        return duplicate


def add_symmetric(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to `total` [K, K], which is symmetric, with half the work if K is large.

    Panels of columns are multiplied down to the diagonal, and what lies above it is mirrored.

    Args:
        rows: float32 [n, K].
    """
    width = total.shape[0]
    with _tensor_cores(rows.device):
        for start in range(0, width, SYMMETRIC_PANEL):
            stop = min(start + SYMMETRIC_PANEL, width)
            total[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
            if stop < width:
                total[start:stop, stop:].copy_(total[stop:, start:stop].T)


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 matrices as TensorFloat-32, ten times as fast."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
