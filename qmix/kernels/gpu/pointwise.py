"""What lies between the matmuls of a layer, on a GPU: residual and norm, rotary and cache, router.

Matmuls with packed weights end in partial sums, float32 [Z, M, width]: Z splits of their inputs and
a row for each pair of token and expert (T rows for a projection). The functions here take them as
they are and add them up while reading, which saves the launch of `combine`. A plain tensor [T,
width] will do as well. Nothing here has a backward pass.

One layer of a decode step has these launches, with packed weights and q, k and v packed as one
matrix:

    | launch                | does                                                                |
    |-----------------------|---------------------------------------------------------------------|
    | 1 residual_norm       | adds the last layer's experts, input_layernorm, to float16          |
    | 2 packed_matmul       | q, k and v                                                          |
    | 3 rotate_store        | adds partial sums, rotates q and k, writes k and v into the cache   |
    | 4 split               | attention over one split of the columns                             |
    | 5 merge               | the splits as one softmax, to float16                               |
    | 6 packed_matmul       | o_proj                                                              |
    | 7 residual_norm_route | adds partial sums, post_attention_layernorm, gate, softmax, top-k   |
    | 8 gate_up             | w1, w3, SiLU                                                        |
    | 9 down                | w2 times the routing weight                                         |

One more residual_norm after the last layer is the final norm.

Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.gpu import pointwise_triton as kernels
from qmix.kernels.gpu.launch import launch, power_of_2
from qmix.kernels.gradients import needs_grad
from qmix.kernels.moe import Routes

_ROTATED_ROWS = 16


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """The result of residual_norm_route.

    Attributes:
        total: [T, D] in x's dtype: x plus the partial sums, which is the next residual.
        normed: [T, D], the norm of `total`.
        logits: [T, E] in x's dtype, the router's raw logits.
        routes: ids and weights [T, k].
    """

    total: Tensor
    normed: Tensor
    logits: Tensor
    routes: Routes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`w * (x * rsqrt(mean(x^2) + eps))` of [..., D], rounded where the reference rounds."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    normed = torch.empty_like(rows)
    _residual_norm(rows, None, weight, eps, rows, normed)
    return normed.view(x.shape)


def residual_norm(
    x: Tensor, partials: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`h = x + sum(partials)` [T, D] in x's dtype, and the norm of h [T, D] in `dtype`.

    Args:
        partials: [Z, M, D] or [T, D].
        dtype: None is x's.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype or x.dtype)
    _residual_norm(x, partials, weight, eps, total, normed)
    return total, normed


def residual_norm_route(
    x: Tensor,
    partials: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor,
    num_experts_per_tok: int,
    *,
    dtype: torch.dtype | None = None,
) -> RouterOutput:
    """residual_norm, then the router over the norm; gate is [E, D] in x's dtype."""
    experts = gate.shape[0]
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype or x.dtype)
    logits = torch.empty(x.shape[0], experts, dtype=x.dtype, device=x.device)
    routes = _routes(logits, num_experts_per_tok)
    _residual_norm(x, partials, weight, eps, total, normed, gate, logits, routes)
    return RouterOutput(total, normed, logits, routes)


def route(logits: Tensor, num_experts_per_tok: int) -> Routes:
    """Softmax over all E experts in float32, top k, renormalised to sum 1: (T, E) -> Routes.

    Of experts with equal logits the lower one comes first. NaN logits choose valid experts, with
    NaN weights.
    """
    routes, experts = _routes(logits, num_experts_per_tok), logits.shape[1]
    launch(
        kernels.route, (len(logits),),
        logits.contiguous(), routes.ids, routes.weights,
        E=experts, CHOSEN=num_experts_per_tok, EXPERTS=power_of_2(experts), num_warps=1,
    )  # fmt: skip
    return routes


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, S, d) by (B or 1, 1, S, d): pairs are (i, i + d / 2); rounded once."""
    batch, heads, queries, width = x.shape
    assert width & (width - 1) == 0, width
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = batch * queries
    block = _block_rows(rows)
    launch(
        kernels.rotate, (-(-rows // block), heads),
        x, out, cos, sin, rows, queries, *x.stride()[:3], 0 if cos.shape[0] == 1 else queries * width,
        D=width, ROWS=block, num_warps=rotation_warps(block),
    )  # fmt: skip
    return out


def rotate_store(
    partials: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: Tensor,
    *,
    heads: int,
    starts: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """Rotate queries and keys, store keys and values; return q [B, S, H, d] in `dtype`.

    Args:
        partials: [Z, T, (H + 2 G) d] or [T, (H + 2 G) d]: the heads of queries, keys and values.
        keys, values: [B, G, R, d], written at slot (past + s) mod R. Of more than R new columns the
            last R are stored. In a cache that must not roll, past + S <= R.
        cos, sin: [positions, d] or (1, 1, positions, d), from `kernels.rotary`. A position beyond
            them gives NaN.
        past: int32 [B] on the device, columns before the new ones.
        starts: int32 [B] on the device, columns of padding on the left, which count as no
            positions.
    """
    partials = _as_partials(partials)
    batch, shared, slots, width = keys.shape
    tokens = partials.shape[1]
    queries = tokens // batch
    assert partials.shape[2] == (heads + 2 * shared) * width, (tuple(partials.shape), heads)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert width & (width - 1) == 0, width
    q = torch.empty(batch, queries, heads, width, dtype=dtype, device=partials.device)
    block = _block_rows(tokens)
    launch(
        kernels.rotate_store, (-(-tokens // block), heads + 2 * shared),
        partials, q, keys, values, cos, sin, past, starts, tokens, queries, cos.shape[-2], slots,
        *keys.stride()[:3], *values.stride()[:3],
        SPLITS=len(partials), H=heads, G=shared, D=width, ROWS=block, num_warps=rotation_warps(block),
    )  # fmt: skip
    return q


def _residual_norm(
    x: Tensor,
    partials: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    normed: Tensor,
    gate: Tensor | None = None,
    logits: Tensor | None = None,
    routes: Routes | None = None,
) -> None:
    tokens, hidden = x.shape
    assert x.is_contiguous()
    assert not needs_grad(x), "no backward"
    if partials is not None:
        partials = _as_partials(partials)
        assert partials.shape[1] % tokens == 0, (tuple(partials.shape), tokens)
        assert partials.shape[2] == hidden, (tuple(partials.shape), hidden)
    pairs = tokens if partials is None else partials.shape[1]
    experts = 1 if gate is None else gate.shape[0]
    block = power_of_2(hidden)
    launch(
        kernels.residual_norm, (tokens,),
        x, partials, weight, total, normed,
        None if gate is None else gate.contiguous(), logits,
        None if routes is None else routes.ids, None if routes is None else routes.weights,
        pairs, hidden, eps,
        SPLITS=1 if partials is None else len(partials), CHOICES=pairs // tokens,
        E=experts, CHOSEN=1 if routes is None else routes.ids.shape[1],
        BLOCK=block, EXPERTS=power_of_2(experts), num_warps=norm_warps(block),
    )  # fmt: skip


def norm_warps(block: int) -> int:
    """Warps for rows of up to `block`. With eight, the assembler spills registers at 4096."""
    return min(max(block // 256, 1), 16)


def _routes(logits: Tensor, chosen: int) -> Routes:
    tokens, experts = logits.shape
    assert 1 <= chosen <= experts, (chosen, experts)
    ids = torch.empty(tokens, chosen, dtype=torch.int64, device=logits.device)
    return Routes(ids, torch.empty(tokens, chosen, dtype=torch.float32, device=logits.device))


def _as_partials(partials: Tensor) -> Tensor:
    """Partial sums [Z, M, width] as they are, or a plain tensor [T, width] as one split."""
    assert partials.is_contiguous()
    return partials[None] if partials.dim() == 2 else partials


def _block_rows(rows: int) -> int:
    """Rows for each thread block: one while rows are few, so that there are many blocks."""
    return 1 if rows <= _ROTATED_ROWS else _ROTATED_ROWS


def rotation_warps(rows: int) -> int:
    """Warps of a block that rotates this many rows."""
    return 1 if rows == 1 else 4
