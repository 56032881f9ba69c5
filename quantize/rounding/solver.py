"""The state of one solve of GPTQ: weights, errors, codes and grids, and the steps that change them.

Shape letters: B matrices at once, N outputs, K inputs, g inputs of a group. Weights are kept as
[B, K, N], so that one input of all outputs is contiguous. Knows nothing of where H comes from.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qmix.quantize.rounding.gptq_group import descend, round_group
from qmix.quantize.rounding.grid import Grid, absmax_grid, search_grid
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scheme import Scheme

_ERROR_ROWS = 1024  # outputs over which the output error is measured


class Solver:
    """Rounds weights for their inputs, group by group, in processing order.

    Args:
        weights: [B, K, N], the weights to be rounded, with the inputs in processing order.
        hessians: [B, K, K], damped, in the same order.
        size: g.
        live_scales, scale_search, trials: see `gptq.RoundingOptions`.
    """

    def __init__(
        self,
        weights: Tensor,
        hessians: Tensor,
        scheme: Scheme,
        size: int,
        *,
        live_scales: bool,
        scale_search: bool,
        trials: int,
    ) -> None:
        self.weights, self.hessians = weights, hessians
        self.scheme, self.size = scheme, size
        self._live_scales, self._scale_search = live_scales, scale_search
        self._trials = trials
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
            tell(1 - (first + self.size) / columns)
            part = slice(first, first + self.size)
            weights, block = self.weights[:, part], lower[:, part, part]
            pivots = block.diagonal(dim1=1, dim2=2)[:, :, None]
            after = slice(first + self.size, columns)
            carried = lower[:, after, part].mT @ self.errors[:, after]
            live = weights
            if self._live_scales:
                live = weights + torch.linalg.solve_triangular(block.mT, carried, upper=True)
            grid = (
                search_grid(live, pivots.square(), self.scheme)
                if self._scale_search
                else absmax_grid(live, self.scheme)
            )
            targets = carried.div_(pivots).add_(weights)
            codes, grid = round_group(weights, targets, grid, block, self._trials)
            self.codes[:, part] = codes
            self.grids[first] = grid
            self._refresh_errors(part)

    def refine(self, tell: Callable[[float], None]) -> None:
        """One round: move each group's scale to its optimum, then each code, all else fixed."""
        for done, (first, grid) in enumerate(self.grids.items()):
            tell(done / len(self.grids))
            part = slice(first, first + self.size)
            block = self.hessians[:, part, part]
            gradient = self.hessians[:, part] @ self.errors
            codes = self.codes[:, part].float()
            hessian_codes = block @ codes
            curvature = (hessian_codes * codes).sum(1)
            change = (gradient * codes).sum(1) / curvature
            scale = grid.scale + torch.where(curvature > 0, change, 0)
            better = grid.rescaled(scale)
            moved = (better.scale - grid.scale)[:, None]
            gradient.addcmul_(hessian_codes, moved, value=-1)
            self.grids[first] = better
            self.codes[:, part] = descend(codes, gradient, block, better)
            self._refresh_errors(part)

    def _refresh_errors(self, part: slice) -> None:
        scale = self.grids[part.start].scale[:, None]
        self.errors[:, part] = self.weights[:, part] - self.codes[:, part] * scale

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
            self._refresh_errors(slice(first, first + self.size))

    def scale_overflows(self) -> list[bool]:
        """For each matrix, whether a scale is too large for float16."""
        finite = [torch.isfinite(grid.scale).all(1) for grid in self.grids.values()]
        return torch.stack(finite).all(0).logical_not().tolist()

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
