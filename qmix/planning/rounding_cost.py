"""What rounding matrices by GPTQ takes on a GPU besides its FLOP, by arithmetic.

Launches, the instructions and the latency of the kernels that walk through a group, and the bytes
that the matmuls between them move. tests/quantize/rounding/test_launches.py counts the launches.
Shape letters: B matrices at once, N outputs, K inputs, g inputs of a group. Knows no torch, no
models and no measurements.
"""

from dataclasses import dataclass

OUTPUT_BLOCKS = 8  # in which the outputs of a matrix are rounded for the loss at the end
TILE = 128  # outputs, and inputs of a group, that a thread block of a matmul takes
LEAST_TILES = 128  # of a matmul; with fewer, parts of the inputs are summed apart
PART_INPUTS = 256  # of such a part

_GROUP = 128  # inputs, by default
# Of a warp for each weight, in the machine code for sm_90: the grid, the codes with 8 trials, and a
# round of coordinate descent.
_SEARCH, _ROUND, _REFINE = 30, 153, 26
# 132 multiprocessors start 4 instructions a cycle at 1.755 GHz: 60 % of it.
_INSTRUCTIONS_S = 0.6 * 132 * 4 * 1.755e9
# A step of a walk waits for two rows of memory, a sum over lanes, and 32 sums in turn.
_STEP_S = 450 / 1.755e9
_LAUNCH_S = 6e-6
_BANDWIDTH = 2e12  # 60 % of the H100's 3.35 TB/s


@dataclass(frozen=True)
class RoundingCost:
    """What some solves take.

    Attributes:
        launches: kernels that are started.
        instructions: of a warp, in the kernels that walk through groups.
        steps: of those walks, one after the other.
        moved_bytes: by the matmuls between them.
    """

    launches: int = 0
    instructions: float = 0.0
    steps: int = 0
    moved_bytes: float = 0.0

    def __add__(self, other: "RoundingCost") -> "RoundingCost":
        return RoundingCost(
            self.launches + other.launches,
            self.instructions + other.instructions,
            self.steps + other.steps,
            self.moved_bytes + other.moved_bytes,
        )

    @property
    def launch_seconds(self) -> float:
        """Of launches, if nothing hides them."""
        return self.launches * _LAUNCH_S

    @property
    def kernel_seconds(self) -> float:
        """Of the kernels: their instructions, and the latency of their steps on top."""
        return self.instructions / _INSTRUCTIONS_S + self.steps * _STEP_S

    @property
    def memory_seconds(self) -> float:
        """Of the matmuls' bytes, on top of their FLOP."""
        return self.moved_bytes / _BANDWIDTH


def solve_cost(
    columns: int,
    rows: int,
    matrices: int,
    *,
    parts: int = 1,
    refine: int = 3,
    blocks: int = 1,
    group: int = _GROUP,
) -> RoundingCost:
    """What `gptq.solve` of B matrices [N, K] at once takes, with groups of 32, 64 or 128 inputs.

    Args:
        parts: matrices that are stacked in each.
        refine: rounds of coordinate descent.
        blocks: of outputs that are rounded in turn.
    """
    groups, outputs = columns // group, -(-rows // blocks)
    passes = 0.5 + refine  # over all errors; the greedy one begins with none
    split = is_split(matrices, outputs, columns)
    product = matrices + 1 if split else 1
    # A transposed factor, a grid and codes; a round of descent.
    each_group = product + 3 + refine * (product + 1)
    taken = 6 * groups if blocks > 1 else 0  # from the blocks of outputs, group by group
    finished = matrices * (42 + parts * (19 + 3 * groups))  # factored, fetched, measured
    launches = blocks * (groups * each_group + 12) + taken + finished
    moved = matrices * blocks * passes * 4 * columns**2 * (1 + outputs / group)
    if split:  # partial sums are written and read
        moved += matrices * blocks * passes * 8 * columns**2 * outputs / PART_INPUTS
    return RoundingCost(
        launches=launches,
        instructions=matrices * rows * columns * (_SEARCH + _ROUND + refine * _REFINE),
        steps=blocks * columns * (2 + 2 * refine),
        moved_bytes=moved,
    )


def is_split(matrices: int, outputs: int, columns: int) -> bool:
    """Whether the matmul before a group sums parts of the inputs apart: it has few outputs."""
    return matrices * -(-outputs // TILE) < LEAST_TILES and columns % PART_INPUTS == 0
