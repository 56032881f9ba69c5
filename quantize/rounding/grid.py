"""The grid of a group of weights: which scale, and which integer codes.

Shape letters: N outputs, g inputs of a group; `...` stands for matrices or trials. A group has the
shape [..., g, N], its scales the shape [..., N]. Knows nothing of which group belongs to which
matrix.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights.scheme import Scheme

# Clippings that are tried, as fractions of the largest magnitude. On trained experts a finer or
# wider list changes the GPTQ loss by less than 0.2 %, a list of six by 0.6 %.
_CLIP_RATIOS = tuple(0.6 + 0.45 * step / 23 for step in range(24))
_SMALLEST_SCALE = 2.0**-24  # the smallest float16


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that a group's weights may take: `code * scale`, with low <= code <= high.

    Attributes:
        scale: float32 [..., N], float16 values, never 0; negative where the most negative code
            stands for the most positive value.
        low, high: [..., N], or one element: the first and the last code. The file stores
            `code - low`.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """The codes nearest to `values` [..., N], as floats."""
        return torch.clamp((values / self.scale).round_(), self.low, self.high)

    def with_input_axis(self) -> "Grid":
        """The same grid with an input axis of length 1 before the output axis."""
        low, high = (b if b.dim() == 0 else b.unsqueeze(-2) for b in (self.low, self.high))
        return Grid(self.scale.unsqueeze(-2), low, high)

    def scaled(self, factor: Tensor) -> "Grid":
        """The grid with its scales multiplied by `factor` [..., 1] and rounded to float16."""
        return Grid(float16_scale(self.scale * factor), self.low, self.high)

    def rescaled(self, scale: Tensor) -> "Grid":
        """The grid with other scales, rounded to float16."""
        return Grid(float16_scale(scale), self.low, self.high)

    def where(self, condition: Tensor, other: "Grid") -> "Grid":
        """This grid where `condition` [..., N] holds, `other` elsewhere."""
        return Grid(
            torch.where(condition, self.scale, other.scale),
            torch.where(condition, self.low, other.low),
            torch.where(condition, self.high, other.high),
        )

    def outputs(self, rows: slice) -> "Grid":
        """The part of the grid that belongs to the outputs `rows`."""
        low, high = (b if b.dim() == 0 else b[..., rows] for b in (self.low, self.high))
        return Grid(self.scale[..., rows], low, high)

    def outputs_repeated(self, times: int) -> "Grid":
        """The grid with all outputs `times` times in a row."""
        low, high = (b if b.dim() == 0 else b.repeat(1, times) for b in (self.low, self.high))
        return Grid(self.scale.repeat(1, times), low, high)

    def gathered(self, index: Tensor) -> "Grid":
        """The grids of the outputs at `index` [B, N]."""
        low, high = (b if b.dim() == 0 else b.gather(-1, index) for b in (self.low, self.high))
        return Grid(self.scale.gather(-1, index), low, high)

    @classmethod
    def concatenated(cls, grids: Sequence["Grid"]) -> "Grid":
        """Grids of consecutive outputs as one."""
        first = grids[0]
        if len(grids) == 1:
            return first
        return cls(
            torch.cat([grid.scale for grid in grids], -1),
            first.low if first.low.dim() == 0 else torch.cat([grid.low for grid in grids], -1),
            first.high if first.high.dim() == 0 else torch.cat([grid.high for grid in grids], -1),
        )


def float16_scale(scale: Tensor) -> Tensor:
    """Round to float16, which is what files hold, but never to 0.

    A group of zeros thus has a scale, and codes 0.
    """
    rounded = scale.half().float()
    smallest = torch.where(scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE)
    return torch.where(rounded == 0, smallest, rounded)


def absmax_grid(group: Tensor, scheme: Scheme) -> Grid:
    """The round-to-nearest grid: the largest magnitude lies half a step beyond the last code.

    An asymmetric grid spans the smallest to the largest value and includes 0. Its zero is clamped
    to 1..15, the values that GPTQ v1 can store.
    """
    return next(_clipped_grids(group, scheme, (1.0,)))


def search_grid(group: Tensor, importance: Tensor, scheme: Scheme) -> Grid:
    """The grid of least `sum importance * (w - Q(w))^2` over clippings and, if symmetric, signs.

    Args:
        group: [..., g, N].
        importance: [..., g, 1].
    """
    best: Grid | None = None
    least = torch.empty(0)
    for grid in _candidates(group, scheme):
        wide = grid.with_input_axis()
        units = group / wide.scale
        error = units.sub_(units.round().clamp_(wide.low, wide.high))
        loss = error.square_().mul_(importance).sum(-2).mul_(grid.scale.square())
        if best is None:
            best, least = grid, loss
        else:
            better = loss < least
            best, least = grid.where(better, best), torch.where(better, loss, least)
    assert best is not None
    return best


def _candidates(group: Tensor, scheme: Scheme) -> Iterator[Grid]:
    for grid in _clipped_grids(group, scheme, _CLIP_RATIOS):
        yield grid
        if scheme.symmetric:
            yield grid.rescaled(grid.scale * other_sign(scheme.bits))


def other_sign(bits: int) -> float:
    """What turns a symmetric scale into the one of the other sign.

    The largest magnitude then gets the code of the longer side, -8 in 4 bits.
    """
    half = 1 << bits - 1
    return -((half - 0.5) / half)


def clip_factors(scheme: Scheme, *, search: bool) -> tuple[list[float], list[float]]:
    """Each clipping that is tried, and the scale that it makes of an extreme of 1.

    Args:
        search: all of `search_grid`; otherwise the one of `absmax_grid`.
    """
    ratios = list(_CLIP_RATIOS if search else (1.0,))
    return ratios, [_scale_factor(ratio, scheme) for ratio in ratios]


def _scale_factor(ratio: float, scheme: Scheme) -> float:
    last = (1 << scheme.bits) - 1
    return 2 * ratio / last if scheme.symmetric else ratio / last


def _clipped_grids(group: Tensor, scheme: Scheme, ratios: Iterable[float]) -> Iterator[Grid]:
    last = (1 << scheme.bits) - 1
    smallest, largest = group.amin(-2), group.amax(-2)
    if scheme.symmetric:
        half = torch.tensor(1 << scheme.bits - 1, dtype=group.dtype, device=group.device)
        # The sign gives the largest magnitude a positive code; `_candidates` also tries the other
        # sign.
        extreme = torch.where(largest >= -smallest, largest, smallest)
        for ratio in ratios:
            yield Grid(float16_scale(extreme * _scale_factor(ratio, scheme)), -half, half - 1)
        return
    low, high = smallest.clamp(max=0), largest.clamp(min=0)
    for ratio in ratios:
        scale = float16_scale((high - low) * _scale_factor(ratio, scheme))
        zero = (low * -ratio / scale).round_().clamp_(1, last)
        yield Grid(scale, -zero, last - zero)
