"""Rounding outputs in turn, so that the errors of some make up for the errors of others.

The loss at the end of the model sees the error E of a matrix as `tr G E H E^T`, where G is the sum
of `g g^T` over the gradients g of that loss with respect to the outputs, and H that of `x x^T` over
the inputs (https://arxiv.org/abs/2505.22988). With `G = L L^T`, starting with the last outputs,
each block is rounded for the targets that cancel the errors of the blocks before it; inside a block
outputs are independent. On gradients of trained experts the loss is then 0.4 to 0.7 of what
independent outputs give; more than 8 blocks would gain 5 % of it (evals/LOG.md).

Shape letters: B matrices at once, N outputs, n outputs of a block, K inputs. Knows nothing of how a
block is rounded.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qmix.planning.rounding_cost import OUTPUT_BLOCKS

_LEAST_BLOCK = 32  # outputs: fewer would leave a step without work
DAMPING = 0.02  # of G's mean diagonal, at least


class OutputFeedback:
    """What each block of outputs should make up for.

    Args:
        moments: B matrices [N, N], the G, or any multiples of them.

    Attributes:
        order: int64 [B, N], the outputs in processing order; the last is rounded first.
    """

    def __init__(self, moments: Sequence[Tensor]) -> None:
        diagonals = torch.stack([each.diagonal() for each in moments])
        self.order = diagonals.argsort(dim=1, stable=True)
        self._lower = torch.empty(len(moments), *moments[0].shape, device=moments[0].device)
        for each, order, lower in zip(moments, self.order, self._lower, strict=True):
            _factorise(each, order, lower)

    def in_order(self, weights: Tensor) -> Tensor:
        """[B, K, N] with the outputs in processing order."""
        return weights.gather(2, self.order[:, None].expand_as(weights))

    def blocks(self) -> Iterator[slice]:
        """The outputs of each block, in processing order from the last block on."""
        outputs = self.order.shape[1]
        step = max(_LEAST_BLOCK, -(-outputs // OUTPUT_BLOCKS))
        for stop in range(outputs, 0, -step):
            yield slice(max(0, stop - step), stop)

    def correction(self, errors: Tensor, rows: slice) -> Tensor:
        """What is added to the weights [B, K, n] of a block before they are rounded.

        Args:
            errors: [B, K, N - stop], weights minus rounded weights of all outputs after `rows`.
        """
        carried = errors @ self._lower[:, rows.stop :, rows]
        block = self._lower[:, rows, rows]
        answer: Tensor = torch.linalg.solve_triangular(block, carried, upper=False, left=False)
        return answer


def _factorise(moments: Tensor, order: Tensor, lower: Tensor) -> None:
    """Write the Cholesky factor of a damped G in processing order into `lower`.

    It is the identity, and corrects nothing, if no gradient reaches the outputs.
    """
    mean = float(moments.diagonal().mean())
    if mean > 0:
        torch.index_select(moments, 0, order, out=lower)
        matrix = lower[:, order]  # 0.8 GB for w1 and w3, as each array here
        matrix.diagonal().add_(DAMPING * mean)
        info = torch.empty(0, dtype=torch.int32, device=moments.device)
        torch.linalg.cholesky_ex(matrix, out=(lower, info))
        if not int(info):
            return
    lower.zero_()
    lower.fill_diagonal_(1)
