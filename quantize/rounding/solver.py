"""The state of one solve of GPTQ: weights, errors, codes and grids, and the steps that change them.

Shape letters: B matrices at once, N outputs, K inputs, g inputs of a group. Weights are kept as
[B, K, N], so that one input of all outputs is contiguous. Knows nothing of where H comes from.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qmix.quantize.rounding.gptq_group import Group, GroupSteps
from qmix.quantize.rounding.grid import Grid
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scheme import Scheme

_ERROR_ROWS = 1024  # outputs over which the output error is measured


class Solver:
    """Rounds weights for their inputs, group by group, in processing order.

    Args:
        weights: [B, K, N], the weights to be rounded, with the inputs in processing order.
        hessians: [B, K, K], damped, in the same order.
        size: g.
        steps: do what is done with each group.
    """

    def __init__(
        self, weights: Tensor, hessians: Tensor, scheme: Scheme, size: int, steps: GroupSteps
    ) -> None:
        self.weights, self.hessians = weights, hessians
        self.scheme, self.size = scheme, size
        self._steps = steps
        self.errors = torch.zeros_like(weights)
        self.codes = torch.zeros_like(weights, dtype=torch.int16)
        self.grids: dict[int, Grid] = {}  # by first input of the group

    def round_greedily(self, lower: Tensor, tell: Callable[[float], None]) -> None:
        """Starting with the last group, choose each group's grid and round its inputs.

        Args:
            lower: [B, K, K], the Cholesky factors of the H.
        """
        columns = self.weights.shape[1]
        for first in range(columns - self.size, -1, -self.size):
            after = first + self.size
            tell(1 - after / columns)
            part = slice(first, after)
            carried = self._steps.product(lower[:, :, part], self.errors, after)
            self.grids[first] = self._steps.round(self._group(part), carried, lower[:, part, part])

    def refine(self, tell: Callable[[float], None]) -> None:
        """One round: move each group's scale to its optimum, then each code, all else fixed."""
        for done, (first, grid) in enumerate(self.grids.items()):
            tell(done / len(self.grids))
            part = slice(first, first + self.size)
            gradient = self._steps.product(self.hessians[:, part].mT, self.errors, 0)
            block = self.hessians[:, part, part]
            self.grids[first] = self._steps.refine(self._group(part), gradient, block, grid)

    def _group(self, part: slice) -> Group:
        return Group(self.weights[:, part], self.codes[:, part], self.errors[:, part])

    def take(self, parts: Sequence["Solver"], order: Tensor) -> None:
        """Take over what `parts` found for consecutive blocks of outputs.

        Args:
            order: [B, N], which output of this solver each output of the parts is.
        """
        back = order.argsort(1)

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            whole = torch.cat(list(tensors), -1)
            return whole.gather(2, back[:, None].expand_as(whole))

        self.codes = joined([part.codes for part in parts])
        for first in parts[0].grids:
            grid = Grid.concatenated([part.grids[first] for part in parts])
            self.grids[first] = grid.gathered(back)
            part = slice(first, first + self.size)
            self._group(part).keep(self.codes[:, part].float(), self.grids[first].scale)

    def scale_overflows(self) -> list[bool]:
        """For each matrix, whether a scale is too large for float16."""
        scales = torch.stack([grid.scale for grid in self.grids.values()])
        return scales.isfinite().all(2).all(0).logical_not().tolist()

    def weight(self, index: int, rows: slice, order: Tensor) -> Affine:
        """Outputs `rows` of matrix `index`, on the CPU.

        Args:
            order: [K], which input of the layer each input here is.
        """
        groups = torch.stack([order[first] for first in self.grids]) // self.size
        by_group = [list(self.grids.items())[i] for i in torch.argsort(groups).tolist()]
        scale = torch.stack([grid.scale[index, rows] for _, grid in by_group], 1)
        lows = torch.stack([grid.low.expand_as(grid.scale)[index, rows] for _, grid in by_group], 1)
        stored = torch.empty_like(self.codes[index, :, rows], dtype=torch.uint8)
        for group, (first, _) in enumerate(by_group):
            part = slice(first, first + self.size)
            stored[order[part]] = (self.codes[index, part, rows] - lows[:, group]).to(torch.uint8)
        bits = self.scheme.bits
        return Affine(
            codes=pack_codes(stored.T.contiguous().cpu(), bits),
            scales=scale.half().cpu(),
            zeros=None if self.scheme.symmetric else (-lows).to(torch.uint8).cpu(),
            bits=bits,
        )

    def output_error(self, index: int, rows: slice, added: float) -> float:
        """The relative error of some outputs over the inputs that H is made of.

        Args:
            added: what was added to H's diagonal.
        """
        sample = slice(rows.start, rows.stop, -(-(rows.stop - rows.start) // _ERROR_ROWS))
        losses = []
        for matrix in (self.errors[index, :, sample], self.weights[index, :, sample]):
            whole = float(((self.hessians[index] @ matrix) * matrix).sum())
            losses.append(max(0.0, whole - added * float(matrix.square().sum())))
        return float((losses[0] / losses[1]) ** 0.5) if losses[1] else 0.0
