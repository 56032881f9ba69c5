"""What lies between the products of a layer, on a GPU: residual and norm, rotary and cache, router.

Products with packed weights end in partials, float32 [N, P, width]: N splits of their inputs, a row
for each pair of token and choice (P = T for a projection, T * k for experts). The functions here
take partials as they are and add them while reading, which saves `combine`'s launch. A plain tensor
[T, width] will do as well. There is no backward pass.

Launches of one layer of a decode step, packed weights, q, k and v packed as one matrix:

    | launch                     | does                                                             |
    |----------------------------|------------------------------------------------------------------|
    | 1 residual_norm            | adds the last layer's experts, input_layernorm, to float16       |
    | 2 packed_matmul            | q, k and v                                                       |
    | 3 rotate_store             | adds the partials, rotates q and k, writes k and v into the cache  |
    | 4 split                    | attention, each share of the columns                             |
    | 5 merge                    | the shares' softmax, to float16                                  |
    | 6 packed_matmul            | o_proj                                                           |
    | 7 residual_norm_route      | adds the partials, post_attention_layernorm, gate, softmax, top-k  |
    | 8 gate_up                  | w1, w3, SiLU                                                     |
    | 9 down                     | w2 times routing weight                                          |

and one residual_norm after the last layer, for the final norm.

Shape letters: B batch, S new positions, T = B * S tokens, N splits, P pairs, D hidden width, E experts,
k chosen, H query heads, G key-value heads, R slots, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.gpu import pointwise_triton as kernels
from qmix.kernels.moe import Routes

_ROTATED_ROWS = 16


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What residual_norm_route leaves.

    Attributes:
        total: x plus what was added, [T, D] in x's dtype: the next residual.
        normed: its norm, [T, D].
        logits: raw router logits, [T, E] in x's dtype.
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
    """`h = x + sum(partials)` and the norm of h: [T, D] in x's dtype, [T, D] in `dtype`, by default x's.

    partials: [N, P, D] or [T, D].
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
    """As residual_norm, and the router over the norm: gate [E, D] in x's dtype."""
    experts = gate.shape[0]
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype or x.dtype)
    logits = torch.empty(x.shape[0], experts, dtype=x.dtype, device=x.device)
    routes = _routes(logits, num_experts_per_tok)
    _residual_norm(x, partials, weight, eps, total, normed, gate, logits, routes)
    return RouterOutput(total, normed, logits, routes)


def route(logits: Tensor, num_experts_per_tok: int) -> Routes:
    """Softmax over all E experts in float32, top k, renormalised to sum 1: (T, E) -> Routes.

    Of equal logits the lower expert comes first. Logits that are no numbers choose valid experts,
    with weights that are none.
    """
    routes, experts = _routes(logits, num_experts_per_tok), logits.shape[1]
    kernels.route[(len(logits),)](
        logits.contiguous(), routes.ids, routes.weights,
        E=experts, CHOSEN=num_experts_per_tok, EXPERTS=power_of_2(experts), num_warps=1,
    )  # fmt: skip
    return routes


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, S, d) by (B or 1, 1, S, d) in Hugging Face's half-split order; rounded once."""
    batch, heads, queries, width = x.shape
    assert width & (width - 1) == 0, width
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = batch * queries
    block = _rows(rows)
    kernels.rotate[(-(-rows // block), heads)](
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
    """Queries rotated, keys rotated and stored, values stored: returns q [B, S, H, d] in `dtype`.

    Args:
        partials: [N, T, (H + 2 G) d] or [T, (H + 2 G) d]: heads of queries, of keys, of values.
        keys, values: [B, G, R, d], written at slot (past + s) mod R. Of more than R new columns the
            last R are kept. Nothing grows: in a cache that must not roll, past + S <= R.
        cos, sin: [positions, d] or (1, 1, positions, d) of all positions, from `kernels.rotary`. A
            position beyond them gives NaN.
        past: int32 [B] on the device, columns before the new ones.
        starts: int32 [B] on the device, columns of padding on the left, which are no positions.
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
    block = _rows(tokens)
    kernels.rotate_store[(-(-tokens // block), heads + 2 * shared)](
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
    assert not (torch.is_grad_enabled() and x.requires_grad), "no backward"
    if partials is not None:
        partials = _as_partials(partials)
        assert partials.shape[1] % tokens == 0, (tuple(partials.shape), tokens)
        assert partials.shape[2] == hidden, (tuple(partials.shape), hidden)
    pairs = tokens if partials is None else partials.shape[1]
    experts = 1 if gate is None else gate.shape[0]
    block = power_of_2(hidden)
    kernels.residual_norm[(tokens,)](
        x, partials, weight, total, normed,
        None if gate is None else gate.contiguous(), logits,
        None if routes is None else routes.ids, None if routes is None else routes.weights,
        pairs, hidden, eps,
        SPLITS=1 if partials is None else len(partials), CHOICES=pairs // tokens,
        E=experts, CHOSEN=1 if routes is None else routes.ids.shape[1],
        BLOCK=block, EXPERTS=power_of_2(experts), num_warps=norm_warps(block),
    )  # fmt: skip


def norm_warps(block: int) -> int:
    """Warps of a program that norms rows of up to `block`. Eight make the assembler spill at 4096."""
    return min(max(block // 256, 1), 16)


def _routes(logits: Tensor, chosen: int) -> Routes:
    tokens, experts = logits.shape
    assert 1 <= chosen <= experts, (chosen, experts)
    ids = torch.empty(tokens, chosen, dtype=torch.int64, device=logits.device)
    return Routes(ids, torch.empty(tokens, chosen, dtype=torch.float32, device=logits.device))


def _as_partials(partials: Tensor) -> Tensor:
    """[N, P, width] of partials, or of a plain tensor [T, width]."""
    assert partials.is_contiguous()
    return partials[None] if partials.dim() == 2 else partials


def _rows(rows: int) -> int:
    """Rows a program rotates: one while tokens are few, so that there are many programs."""
    return 1 if rows <= _ROTATED_ROWS else _ROTATED_ROWS


def rotation_warps(rows: int) -> int:
    """Warps of a program that rotates this many rows."""
    return 1 if rows == 1 else 4


def power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`."""
    return 1 << (count - 1).bit_length()
