"""The inner loops of GPTQ on a GPU: three kernels for what `GroupLoops` does input by input.

A group takes one launch for its grid, one for its codes, and one for a pass of coordinate descent,
besides the matmul before each. Shape letters: see rounding.gptq_group. Knows nothing of whether the
kernels run on a device (gptq_choice).
"""

import torch
from torch import Tensor

from qmix.kernels.gpu.launch import launch, power_of_2
from qmix.planning.rounding_cost import PART_INPUTS, is_split
from qmix.quantize.rounding import gptq_triton as kernels
from qmix.quantize.rounding.gptq_group import Group, GroupOptions, trial_factors
from qmix.quantize.rounding.grid import Grid, clip_factors, other_sign
from qmix.weights.scheme import Scheme

# Columns of a warp: four lanes share one, with 32 registers each at 128 inputs. Half as many take
# longer for each, and twice as many spill.
COLUMNS = 8


class GroupKernels:
    """`GroupSteps` by Triton kernels, on one device.

    Args:
        scheme: its groups have one of gptq_choice.KERNEL_SIZES.
    """

    def __init__(self, scheme: Scheme, options: GroupOptions, device: torch.device) -> None:
        self._bits, self._symmetric = scheme.bits, scheme.symmetric
        self._options = options
        ratios, factors = clip_factors(scheme, search=options.scale_search)
        self._clips = torch.tensor([ratios, factors], device=device)
        self._factors = trial_factors(options.trials, device)
        half = torch.tensor(1 << scheme.bits - 1, dtype=torch.float32, device=device)
        self._bounds = (-half, half - 1)

    def product(self, factors: Tensor, errors: Tensor, first: int) -> Tensor:
        """See `GroupSteps`. Few outputs are split over the inputs, which fills the GPU."""
        count, inputs, size = factors.shape
        outputs = errors.shape[2]
        if not is_split(count, outputs, inputs) or first == inputs:
            return factors[:, first:].mT @ errors[:, first:]
        begin = first // PART_INPUTS * PART_INPUTS  # the errors before `first` are zeros
        parts = (inputs - begin) // PART_INPUTS
        sums = errors.new_empty(count, parts, size, outputs)
        for matrix in range(count):
            left = factors[matrix, begin:].view(parts, PART_INPUTS, size).mT
            right = errors[matrix, begin:].view(parts, PART_INPUTS, outputs)
            torch.bmm(left, right, out=sums[matrix])
        return sums.sum(1)

    def round(self, group: Group, carried: Tensor, lower: Tensor) -> Grid:
        """See `GroupSteps`; two launches."""
        count, size, outputs = group.weights.shape
        upper = lower.mT.contiguous()
        grid = self._search(group.weights, carried, upper)
        kept, low = torch.empty_like(grid.scale), None if self._symmetric else grid.low
        trials = self._options.trials
        padded = power_of_2(trials)
        columns = max(COLUMNS, padded)
        launch(
            kernels.round_group, (-(-outputs * padded // columns), count),
            group.weights, carried, upper, self._factors, grid.scale, low, kept,
            group.codes, group.errors, outputs, _matrix_stride(group),
            SIZE=size, BITS=self._bits, SYMMETRIC=self._symmetric, TRIALS=trials, R=padded,
            COLUMNS=columns, num_warps=1,
        )  # fmt: skip
        return Grid(kept, grid.low, grid.high)

    def refine(self, group: Group, gradient: Tensor, hessian: Tensor, grid: Grid) -> Grid:
        """See `GroupSteps`; one launch."""
        count, size, outputs = group.weights.shape
        moved, low = torch.empty_like(grid.scale), None if self._symmetric else grid.low
        launch(
            kernels.refine_group, (-(-outputs // COLUMNS), count),
            group.weights, gradient, hessian, grid.scale, low, moved, group.codes, group.errors,
            outputs, _matrix_stride(group), hessian.stride(0), hessian.stride(1),
            SIZE=size, BITS=self._bits, SYMMETRIC=self._symmetric, COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
        return Grid(moved, grid.low, grid.high)

    def _search(self, weights: Tensor, carried: Tensor, upper: Tensor) -> Grid:
        count, size, outputs = weights.shape
        scale = weights.new_empty(count, outputs)
        low, high = self._bounds if self._symmetric else (torch.empty_like(scale) for _ in range(2))
        both = self._symmetric and self._options.scale_search
        launch(
            kernels.search_grid, (-(-outputs // COLUMNS), count),
            weights, carried, upper, self._clips, scale,
            *((None, None) if self._symmetric else (low, high)),
            outputs, weights.stride(0), self._clips.shape[1], other_sign(self._bits),
            SIZE=size, BITS=self._bits, SYMMETRIC=self._symmetric,
            LIVE=self._options.live_scales, SIGNS=1 + both, COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
        return Grid(scale, low, high)


def _matrix_stride(group: Group) -> int:
    """Elements from one matrix to the next, the same in all views of a group."""
    assert group.weights.stride() == group.codes.stride() == group.errors.stride()
    assert group.weights.stride(1) == group.weights.shape[2]
    return group.weights.stride(0)
