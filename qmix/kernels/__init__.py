"""Kernels: one table, (weight type, device) -> the backend that multiplies.

A backend may be faster than `x @ w.dequantize().T`, but it computes the same; the `reference`
backend is exactly that. Knows nothing of models, files or tiers.

Shape letters, here and in qmix.weights; a file names only what it adds:

    B  rows of the batch       H  query heads            E  experts
    S  new positions           G  key-value heads        k  experts per token
    L  positions so far        d  width of a head        M  pairs of token and expert, T * k
    T  tokens, B * S           D  hidden width           Z  splits of K or L among thread blocks
    N  outputs of a matmul     F  expert width           R  slots of a cache
    K  inputs of a matmul      C  inputs of a tile       W  sliding window
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UnsupportedError
from qmix.kernels import attention, bnb, dense, pointwise, reference, tiles
from qmix.kernels.attention import Implementation
from qmix.kernels.attention_mask import CAUSAL, AttentionMask, keys_in_window, visible
from qmix.kernels.backend import current, overridden, override
from qmix.kernels.cpu import matmul
from qmix.kernels.cpu.library import DENSE_TOKENS, attends, library
from qmix.kernels.cpu.pointers import takes
from qmix.kernels.gpu import packed_matmul, probe
from qmix.kernels.gradients import needs_grad
from qmix.kernels.moe import ExpertTokens, Routes, moe_forward, moe_forward_sorted
from qmix.kernels.pointwise import rotary
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense, Weight
from qmix.weights.expert import Expert
from qmix.weights.packed.weight import PackedExperts, PackedWeight
from qmix.weights.table import Table

__all__ = [
    "CAUSAL",
    "AttentionMask",
    "Expert",
    "PackedExperts",
    "PackedWeight",
    "Routes",
    "apply_rotary",
    "attend",
    "experts",
    "linear",
    "linears",
    "overridden",
    "override",
    "packed_experts",
    "rms_norm",
    "rotary",
    "route",
    "tokens_as_alone",
    "visible",
]

LinearFn = Callable[[Tensor, Weight], Tensor]

# Where there are no kernels for a weight, tiles of it are dequantized and multiplied.
_LINEAR: Mapping[tuple[type, str], LinearFn] = {
    (Dense, "cpu"): dense.linear,
    (Dense, "cuda"): dense.linear,
    (Table, "cpu"): matmul.linear,
    (Table, "cuda"): tiles.linear,
    (Affine, "cpu"): matmul.linear,
    (Affine, "cuda"): tiles.linear,
    (PackedWeight, "cuda"): packed_matmul.linear,
}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [..., K] times [N, K] gives [..., N] in x's dtype.

    Raises:
        UnsupportedError: no backend multiplies such a weight on x's device.
    """
    assert x.shape[-1] == weight.shape[1], (tuple(x.shape), weight.shape)
    if overridden():
        return _linear_elsewhere(x, weight)
    backend = _LINEAR.get((type(weight), x.device.type))
    if backend is None:
        raise UnsupportedError(
            f"no kernel multiplies {type(weight).__name__} on {x.device.type}",
            expected=", ".join(f"{kind.__name__} on {device}" for kind, device in _LINEAR),
        )
    return backend(x, weight)


def _linear_elsewhere(x: Tensor, weight: Weight) -> Tensor:
    """`linear` by another backend than this package's own kernels."""
    if current() == "reference":
        return reference.linear(x, weight)
    if isinstance(weight, Dense):
        return F.linear(x, weight.data)
    if isinstance(weight, PackedWeight):
        weight = weight.unpack()
    if current() == "bitsandbytes" and isinstance(weight, Table) and bnb.takes(weight):
        return bnb.linear(x, weight)
    return tiles.linear(x, weight)


def linears(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """`linear` with each of several weights, in one call where their backend can."""
    if _compiled(x, weights):
        return matmul.linears(x, weights)
    return [linear(x, weight) for weight in weights]


def tokens_as_alone(weight: Weight) -> int:
    """Up to how many tokens in bfloat16 `linear` computes each as if it were alone, to the bit.

    1 where nothing is known of that, as on a GPU.
    """
    if overridden() or library().isa is None or weight.device.type != "cpu":
        return 1
    if isinstance(weight, Dense):
        is_few = weight.dtype == torch.bfloat16 and weight.data.is_contiguous()
        return DENSE_TOKENS if is_few else 1
    return library().tokens_as_alone(weight) if takes(weight) else 1


def experts(
    x: Tensor,
    routes: Routes,
    weights: Sequence[Expert],
    act: Callable[[Tensor], Tensor],
    *,
    resident: bool = True,
) -> Tensor:
    """Each token through its chosen experts: [T, D] -> [T, D], summed in float32.

    Experts that no token chose are not touched.

    Args:
        resident: all experts stay in memory, so that several may be asked for at once. If not,
            `weights[i]` is asked for once a chosen expert, in ascending order, and let go before
            the next.
    """
    if current() == "reference":
        return reference.experts(x, routes, weights, act)
    if overridden():
        return moe_forward(x, routes, weights, act, linears)
    compiled = len(x) > 0 and x.is_cpu and library().isa is not None
    if compiled and act is F.silu and not needs_grad(x):
        return moe_forward_sorted(x, routes, weights, _add_experts, resident=resident)
    return moe_forward(x, routes, weights, act, linears)


def packed_experts(
    x: Tensor, routes: Routes, weights: PackedExperts, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """`experts` in the packed layout.

    The kernels fuse SiLU and have no gradients: other activations, and gradients, take one matrix
    after the other.
    """
    if current() == "reference":
        return reference.experts(x, routes, weights, act)
    if act is F.silu and not overridden() and not needs_grad(x):
        return packed_matmul.experts(x, routes, weights)
    return moe_forward(x, routes, weights, act, linears)


def _add_experts(x: Tensor, chosen: Sequence[Expert], through: ExpertTokens, out: Tensor) -> None:
    if matmul.takes_experts(x, chosen, through):
        matmul.add_experts(x, chosen, through, out)
        return
    for expert, own in zip(chosen, through.each(), strict=True):
        gate, up = linears(x[own.tokens], (expert.w1, expert.w3))
        y = linear(F.silu(gate) * up, expert.w2).float()
        out.index_add_(0, own.tokens, y * own.routing_weights[:, None])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See pointwise.rms_norm: [..., D]."""
    if overridden():
        return pointwise.rms_norm(x, weight, eps)
    if not _fused(x, weight):
        return dense.rms_norm(x, weight, eps)
    from qmix.kernels.gpu import pointwise as gpu

    return gpu.rms_norm(x, weight, eps)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See pointwise.apply_rotary: (B, H, S, d)."""
    if not _fused(x) or x.shape[-1] & (x.shape[-1] - 1):
        return pointwise.apply_rotary(x, cos, sin)
    from qmix.kernels.gpu import pointwise as gpu

    return gpu.apply_rotary(x, cos, sin)


def route(logits: Tensor, num_experts_per_tok: int) -> Routes:
    """See pointwise.route: (T, E) -> Routes."""
    if not _fused(logits):
        return pointwise.route(logits, num_experts_per_tok)
    from qmix.kernels.gpu import pointwise as gpu

    return gpu.route(logits, num_experts_per_tok)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = CAUSAL,
    *,
    dropout: float = 0.0,
    implementation: Implementation = "sdpa",
) -> Tensor:
    """See attention.attend_with.

    `sdpa` leaves to our kernels what it would need a mask for on a GPU, and single tokens on a CPU.
    k and v may be rows of codes, see kv_rows.

    Raises:
        UnsupportedError: `triton`, where our kernels do not run.
    """
    if implementation == "triton" and q.is_cuda:
        error = probe.why_not(q.device, q.dtype)
        if error is not None:
            raise error
    queries, keys = q.shape[2], k.shape[2]
    replaceable = implementation == "sdpa" and mask.attn_mask is None and not dropout
    if replaceable and not mask.is_explicit and _single(q, k, v):
        seen = keys_in_window(keys, queries, mask.window)
        return library().attend(q, k[:, :, -seen:], v[:, :, -seen:])
    if replaceable and _fused(q, k, v):
        from qmix.kernels.gpu import attention as gpu

        causal = queries == keys and mask.only_causal(keys)
        if not causal and q.shape[-1] in gpu.HEAD_WIDTHS and q.dtype == k.dtype:
            implementation = "triton"
    return attention.attend_with(implementation, q, k, v, mask, dropout)


def _compiled(x: Tensor, weights: Sequence[Weight]) -> bool:
    """Whether the compiled CPU kernels multiply all of these."""
    return x.is_cpu and all(map(takes, weights)) and not overridden()


def _single(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled CPU attention takes these: single tokens, without gradients."""
    return attends(q, k, v) and not overridden() and not needs_grad(q, k, v)


def _fused(*tensors: Tensor) -> bool:
    """Whether GPU kernels without gradients take these: on a GPU, in dtypes that they know."""
    return (
        all(t.is_cuda and t.dtype in _FLOATS for t in tensors)
        and not overridden()
        and not needs_grad(*tensors)
        and probe.usable(tensors[0].device, tensors[0].dtype)
    )
