# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
"""Programmatic dependent launch: a launch starts while the one before it drains.

Both instructions do nothing where a launch is not a dependent one, and exist from compute
capability 9.0 on. What a block does before it waits must read nothing that an earlier launch wrote,
not only the last one: that one may not have waited itself yet. Weights are such things.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LINE = tl.constexpr(128)  # bytes of a line of the second-level cache


@triton.jit
def await_previous(DEPENDENT: tl.constexpr):
    """Let the next launch start, and wait until all that the ones before wrote can be read."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(source, part, count, PARTS: tl.constexpr, LANES: tl.constexpr):
    """Ask the second-level cache for `count` bytes; of PARTS blocks each asks for its share."""
    for start in tl.range(part * LANES * _LINE, count, PARTS * LANES * _LINE):
        line = tl.minimum(start + tl.arange(0, LANES) * _LINE, count - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [source + line],
            tl.int32, False, 1,
        )  # fmt: skip
