"""Round to nearest, without calibration: the baseline of the better methods.

Shape letters: N outputs, K inputs, g inputs of a group, G groups, n outputs of a slab.
"""

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.quantize.rounding.grid import absmax_grid, search_grid
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.dense import all_finite
from qmix.weights.scheme import Scheme

_SLAB_ELEMENTS = 1 << 22  # weights rounded at a time: 16 MiB of float32


def quantize(
    weight: Tensor, scheme: Scheme, *, search: bool = False, where: str = "weight"
) -> Affine:
    """Round each weight to the nearest code.

    By default the largest magnitude of a group lies half a step beyond the last code.

    Args:
        weight: [N, K], any floating dtype.
        scheme: `int4` or `int8`; its group size must divide K.
        search: choose each group's scale for the least squared error instead.
        where: file and tensor, for errors.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for float16 scales.
    """
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    assert columns % size == 0, (columns, size)
    packed, scales, zeros = [], [], []
    step = max(1, _SLAB_ELEMENTS // columns)
    for start in range(0, rows, step):
        slab = weight[start : start + step].float()
        if not all_finite(slab):
            raise CheckpointError(
                "NaN or infinity in the weight",
                where=where,
                remedy="The checkpoint is damaged; download it again.",
            )
        groups = slab.view(len(slab), -1, size).permute(1, 2, 0)  # [G, g, n]
        grid = absmax_grid(groups, scheme)
        if search:
            grid = search_grid(groups, torch.ones(1, device=groups.device), scheme)
        if not all_finite(grid.scale):
            raise CheckpointError(
                "weights too large for float16 scales", where=where, expected="scales below 65504"
            )
        wide = grid.with_input_axis()
        codes = wide.nearest(groups).sub_(wide.low).to(torch.uint8)
        packed.append(pack_codes(codes.permute(2, 0, 1).reshape(len(slab), columns), scheme.bits))
        scales.append(grid.scale.half().T)
        zeros.append((-grid.low).to(torch.uint8).T if not scheme.symmetric else grid.scale.T)
    return Affine(
        codes=torch.cat(packed),
        scales=torch.cat(scales),
        zeros=None if scheme.symmetric else torch.cat(zeros),
        bits=scheme.bits,
    )
