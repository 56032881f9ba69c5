"""The kernels that a solve starts on a GPU are as many as the plan counts.

Torch's operations are counted on the CPU, where each stands for one kernel. Our own launches are
replaced by something that only fills their results.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from qmix.planning.rounding_cost import is_split, solve_cost
from qmix.quantize.rounding import gptq, gptq_kernels
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.gptq_group import GroupLoops
from qmix.quantize.rounding.gptq_kernels import GroupKernels
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.scheme import Scheme

# Operations that only look at memory, reserve it or read a number back.
NO_KERNELS = {
    *("view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "unbind", "diagonal"),
    *("t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "detach", "alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "lift_fresh"),
}
GROUP = 32


class Count(TorchDispatchMode):
    """Counts what would start a kernel."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        self.found[name] += name not in NO_KERNELS
        return function(*arguments, **(named or {}))

    def launch(self, kernel, grid, *arguments, **constants):
        self.found[kernel.__name__] += 1
        with _disable_current_modes():
            for each in arguments:
                if isinstance(each, torch.Tensor) and each.dim() == 2:
                    each.fill_(1)


def moments_of(columns):
    moments = Moments(columns, torch.device("cpu"), crossed=True)
    moments.hessian.copy_(torch.eye(columns))
    moments.cross.copy_(torch.eye(columns))
    moments.tokens = moments._weight_sum = moments._square_sum = 10 * columns
    return moments


def counted(columns, rows, matrices, *, parts, refine, blocks):
    outputs = [torch.eye(rows) for _ in range(matrices)] if blocks > 1 else None
    with Count() as count, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_kernels, "launch", count.launch)
        gptq.solve(
            torch.ones(matrices, rows, columns),
            [moments_of(columns) for _ in range(matrices)],
            Scheme(kind="int4", group_size=GROUP),
            RoundingOptions(refine=refine),
            where=["w"] * matrices,
            parts=[rows // parts] * parts,
            output_moments=outputs,
        )
    return count.found


@pytest.fixture
def by_kernels(monkeypatch):
    monkeypatch.setattr(gptq, "group_steps", lambda d, size, *rest: GroupKernels(*rest, d))


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("columns", [512, 1024])
@pytest.mark.parametrize(
    ("rows", "matrices", "parts", "blocks"),
    [(64, 1, 1, 1), (96, 1, 3, 1), (64, 3, 2, 1), (256, 1, 1, 8), (256, 3, 1, 8)],
)
def test_the_launches_of_a_solve_are_those_of_the_plan(
    by_kernels, columns, rows, matrices, parts, blocks, refine
):
    found = counted(columns, rows, matrices, parts=parts, refine=refine, blocks=blocks)
    cost = solve_cost(
        columns, rows, matrices, parts=parts, refine=refine, blocks=blocks, group=GROUP
    )
    assert is_split(matrices, rows // blocks, columns)
    assert sum(found.values()) == pytest.approx(cost.launches, rel=0.05)
    groups = columns // GROUP
    assert found["search_grid"] == found["round_group"] == blocks * groups
    assert found["refine_group"] == refine * blocks * groups


def test_many_outputs_are_one_product(by_kernels, monkeypatch):
    for module in ("qmix.planning.rounding_cost", "qmix.quantize.rounding.gptq_kernels"):
        monkeypatch.setattr(f"{module}.is_split", lambda *_: False)
    settings = {"parts": 1, "refine": 3, "blocks": 1}
    found = counted(512, 64, 3, **settings)
    cost = solve_cost(512, 64, 3, **settings, group=GROUP)
    assert sum(found.values()) == pytest.approx(cost.launches, rel=0.05)
    assert found["bmm"] == pytest.approx(4 * 16, abs=4)


def test_torchs_loops_would_start_forty_times_as_many(monkeypatch):
    """Input by input, with 48 grids tried for each group."""
    monkeypatch.setattr(gptq, "group_steps", lambda d, size, *rest: GroupLoops(*rest))
    found = sum(counted(256, 128, 1, parts=1, refine=1, blocks=4).values())
    cost = solve_cost(256, 128, 1, refine=1, blocks=4, group=GROUP)
    assert found > 40 * cost.launches
