"""What rounding a group by GPTQ takes: its matmuls and kernels, beside what the plan counts.

The shapes are those of a block of outputs of w1 and of w2, in float32 with random numbers, on which
no time depends. Knows no checkpoint.
"""

from collections.abc import Callable, Iterator

import torch

from qmix.evals.steps.graph_timing import timed_as_is
from qmix.evals.steps.setting import Setting
from qmix.planning.rounding_cost import OUTPUT_BLOCKS, solve_cost
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.gptq_choice import first_miss
from qmix.quantize.rounding.gptq_group import Group, GroupSteps
from qmix.quantize.rounding.gptq_kernels import GroupKernels
from qmix.weights.scheme import Scheme

_REPEATS = 10


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """One result for the self-check, then one for each matrix: the microseconds of a group.

    `predicted` are those that planning.rounding_cost counts for it, without FLOP and launches.
    """
    size = 32 if setting.is_rehearsal else 128
    scheme, options = Scheme(kind="int4", group_size=size), RoundingOptions()
    miss = first_miss(setting.device, size, scheme, options.of_group)
    check: dict[str, object] = {"matrix": "self-check"}
    if miss is not None:
        check["failed"] = f"{miss.what}: an error of {miss.error:.1%}"
    yield check
    config = setting.widths.config
    steps = GroupKernels(scheme, options.of_group, setting.device)
    for name, columns, rows in (
        ("w1", config.hidden_size, config.intermediate_size),
        ("w2", config.intermediate_size, config.hidden_size),
    ):
        cost = solve_cost(columns, rows, 1, refine=options.refine, blocks=OUTPUT_BLOCKS, group=size)
        seconds = cost.kernel_seconds + cost.memory_seconds
        call = _group(setting, steps, columns, rows // OUTPUT_BLOCKS, size, options.refine)
        yield {
            "matrix": name,
            "microseconds": timed_as_is(
                call, setting.clock, 1 if setting.is_rehearsal else _REPEATS
            ),
            "predicted": 1e6 * seconds * size / (OUTPUT_BLOCKS * columns),
        }


def _group(
    setting: Setting, steps: GroupSteps, columns: int, outputs: int, size: int, refine: int
) -> Callable[[], object]:
    """What rounds and refines the group in the middle of a matrix."""
    weights, errors = torch.randn(2, 1, columns, outputs, device=setting.device)
    codes = torch.zeros(1, columns, outputs, dtype=torch.int16, device=setting.device)
    square = torch.randn(1, columns, columns, device=setting.device).tril_(-1).div_(columns)
    square.diagonal(dim1=1, dim2=2).fill_(1)
    first = columns // 2 // size * size
    part = slice(first, first + size)
    group, block = Group(weights[:, part], codes[:, part], errors[:, part]), square[:, part, part]

    def call() -> None:
        carried = steps.product(square[:, :, part], errors, first + size)
        grid = steps.round(group, carried, block)
        for _ in range(refine):
            gradient = steps.product(square[:, part].mT, errors, 0)
            grid = steps.refine(group, gradient, block, grid)

    return call
