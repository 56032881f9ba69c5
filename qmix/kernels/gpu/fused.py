"""A layer of a decode step in five launches: products whose last blocks do what lies between them.

    | launch                | does                                                                |
    |-----------------------|---------------------------------------------------------------------|
    | 1 matmul_rotate_store | q, k and v; rotates, writes k and v into the cache                  |
    | 2 split               | attention; the last split of a head merges the others               |
    | 3 matmul_add_route    | o_proj; the residual, the next norm's shares, gate, softmax, top-k  |
    | 4 gate_up             | w1, w3, SiLU                                                        |
    | 5 down_add            | w2 times the routing weight; the residual, the next norm's shares   |

The rest is in qmix.kernels.gpu.attention and .moe; the same layer in nine launches in .pointwise.
The results differ by the order of a norm's additions, and by fewer roundings: a norm is not rounded
to the model's dtype before it is multiplied. For at most DECODE_TOKENS tokens, one a row, and heads
of 128. Nothing here has a backward pass.

Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.gpu import fused_triton as kernels
from qmix.kernels.gpu import moe
from qmix.kernels.gpu.grid import UNTUNED, Grid, Tuning, roomy
from qmix.kernels.gpu.launch import dependency, launch, power_of_2
from qmix.kernels.gpu.moe import Finish
from qmix.kernels.gpu.pointwise import norm_warps
from qmix.kernels.moe import DECODE_TOKENS, Routes
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.tile_format import PANEL

HEAD_WIDTH = PANEL  # a panel of q, k and v is a head
_PANEL_PARTS = 4  # the most blocks that a panel's rows are cut into


@dataclass(frozen=True, eq=False)
class Normed:
    """A residual, and its RMSNorm before the division by the root of the mean square.

    Attributes:
        total: [T, D] in the model's dtype, the residual.
        weighted: float16 [T, D], the residual times the norm's weight times `scale`.
        squares: float32 [T, S], shares of the mean square plus epsilon, of the scaled residual.
        scale: float32 [T], powers of 2.
    """

    total: Tensor
    weighted: Tensor
    squares: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Early:
    """What a launch does while the one before it drains; only where `launch.can_depend`.

    Attributes:
        dependent: its blocks may start.
        prefetch: they ask the second-level cache for their weights before they wait.
    """

    dependent: bool = False
    prefetch: bool = False

    @property
    def constants(self) -> dict[str, object]:
        """Of a product whose weights are known before its input."""
        return {**dependency(self.dependent), "PREFETCH": self.dependent and self.prefetch}


LATE = Early()


def counters(rows: int, device: torch.device) -> Tensor:
    """Arrivals for products with up to `rows` rows: zeros, and zeros again after each launch."""
    count = _PANEL_PARTS * (rows // PANEL) + 1
    return torch.zeros(count, dtype=torch.int32, device=device)


def start_norm(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """The norm of the first layer's input [T, D]."""
    tokens, hidden = x.shape
    assert tokens <= DECODE_TOKENS, tokens
    normed = _normed(x, 1)
    block = power_of_2(hidden)
    launch(
        kernels.start_norm, (tokens,),
        x, weight, normed.weighted, normed.squares, normed.scale, hidden, eps,
        BLOCK=block, num_warps=norm_warps(block),
    )  # fmt: skip
    return Normed(x, normed.weighted, normed.squares, normed.scale)


def rotated_qkv(
    x: Normed | Tensor,
    weight: PackedMatrix,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: Tensor,
    arrivals: Tensor,
    *,
    heads: int,
    starts: Tensor | None = None,
    dtype: torch.dtype,
    tuning: Tuning = UNTUNED,
    early: Early = LATE,
) -> Tensor:
    """`pointwise.rotate_store` of the product with q, k and v: q [B, 1, H, 128] in `dtype`.

    Args:
        x: float16 [B, D], or a norm that is not divided yet.
        arrivals: of `counters`.
    """
    rows, squares = (x.weighted, x.squares) if isinstance(x, Normed) else (x, None)
    batch, shared, slots, width = keys.shape
    assert width == HEAD_WIDTH, width
    assert len(rows) == batch <= DECODE_TOKENS, (tuple(rows.shape), batch)
    assert weight.shape[0] == (heads + 2 * shared) * width, (weight.shape, heads)
    q = torch.empty(batch, 1, heads, width, dtype=dtype, device=rows.device)

    def finish(grid: Grid) -> Finish:
        arguments = (
            *(squares, arrivals, q, keys, values, cos, sin, past, starts, cos.shape[-2], slots),
            *keys.stride()[:3],
            *values.stride()[:3],
        )
        sizes = {"Z": grid.splits, "H": heads, "G": shared, **moe.slices(squares)}
        return Finish(kernels.matmul_rotate_store, arguments, sizes | early.constants)

    moe.linear_partials(rows, weight, tuning, finish=finish)
    return q


def project_route(
    x: Tensor,
    weight: PackedMatrix,
    last: Normed,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    num_experts_per_tok: int,
    arrivals: Tensor,
    tuning: Tuning = UNTUNED,
    early: Early = LATE,
) -> tuple[Normed, Routes]:
    """`last.total + x @ weight.T`, its norm, and the router's choice.

    Args:
        x: float16 [T, K].
        norm: the weight of the norm, [D].
        gate: [E, D] in the model's dtype.
    """
    tokens, experts = len(x), len(gate)
    ids = torch.empty(tokens, num_experts_per_tok, dtype=torch.int64, device=x.device)
    routes = Routes(ids, torch.empty(ids.shape, dtype=torch.float32, device=x.device))
    found: list[Normed] = []

    def finish(grid: Grid) -> Finish:
        normed = _normed(last.total, grid.rows)
        found.append(normed)
        wide = power_of_2(experts)
        shares = torch.empty(tokens, grid.rows, wide, dtype=torch.float32, device=x.device)
        arguments = (
            *(arrivals, last.total, norm, normed.total, normed.weighted, normed.squares),
            *(normed.scale, last.squares, last.scale, gate, shares, ids, routes.weights, eps),
        )
        sizes = {"Z": grid.splits, "E": experts, "EXPERTS": wide, "CHOSEN": num_experts_per_tok}
        constants: dict[str, object] = {
            **sizes,
            **moe.slices(normed.squares),
            **_last_slices(last),
        }
        constants |= {**early.constants, **roomy(grid.config)}
        return Finish(kernels.matmul_add_route, arguments, constants)

    moe.linear_partials(x, weight, tuning, finish=finish)
    return found[0], routes


def add_experts(
    last: Normed,
    routes: Routes,
    table: ExpertTable,
    norm: Tensor,
    eps: float,
    arrivals: Tensor,
    tuning: Tuning = UNTUNED,
    down_tuning: Tuning | None = None,
    gate_arrivals: Tensor | None = None,
    early: Early = LATE,
) -> Normed:
    """`last.total` plus the chosen experts' outputs for its norm, and the norm of the sum.

    Args:
        gate_arrivals: see `moe.expert_partials`.
    """
    found: list[Normed] = []

    def finish(grid: Grid) -> Finish:
        normed = _normed(last.total, grid.rows)
        found.append(normed)
        arguments = (
            *(arrivals, last.total, norm, normed.total, normed.weighted, normed.squares),
            *(normed.scale, last.squares, last.scale, eps),
        )
        constants = {"Z": grid.splits, "S": grid.rows, **_last_slices(last)}
        return Finish(kernels.down_add, arguments, constants | dependency(early.dependent))

    moe.expert_partials(
        last.weighted, routes, table, 0, tuning, down_tuning,
        squares=last.squares, finish=finish, arrivals=gate_arrivals, dependent=early.dependent,
    )  # fmt: skip
    return found[0]


def _normed(x: Tensor, slices: int) -> Normed:
    """Room for a norm of [T, D] in so many shares."""
    squares = torch.empty(len(x), slices, dtype=torch.float32, device=x.device)
    weighted = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    return Normed(torch.empty_like(x), weighted, squares, scale)


def _last_slices(last: Normed) -> dict[str, object]:
    sizes = moe.slices(last.squares)
    return {"LAST_S": sizes["S"], "LAST_SLICES": sizes["SLICES"]}
