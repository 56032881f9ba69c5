"""The blocks of FP8 weights that share a scale: sizes from the number of scales, and back.

Shape letters as in qmix.kernels. Knows no torch and no settings.
"""

from collections.abc import Sequence

from qmix.formats.layouts.settings import PackedModule

_USUAL_BLOCK = 128


def fits_blocks(block: Sequence[int], module: PackedModule) -> bool:
    """Whether an FP8 module's scales are those of blocks of so many outputs and inputs."""
    if len(module.scale_shape) != 2:
        return module.groups == 1 and all(
            -(-extent // size) == 1 for extent, size in zip(module.shape, block, strict=True)
        )
    return all(
        -(-extent // size) == count and (count == 1 or block_size(extent, count) == size)
        for extent, size, count in zip(module.shape, block, module.scale_shape, strict=True)
    )


def block_size(extent: int, blocks: int) -> int | None:
    """Rows or columns of a block, the last of which may be short; None if no size fits."""
    if -(-extent // _USUAL_BLOCK) == blocks:
        return _USUAL_BLOCK
    return extent // blocks if blocks and extent % blocks == 0 else None
