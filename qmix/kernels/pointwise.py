"""Pointwise parts of a layer, as plain torch operations: RMSNorm, rotary embedding, router.

Shape letters: see qmix.kernels.
"""

import torch
from torch import Tensor

from qmix.kernels.moe import Routes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x * rsqrt(mean(x^2) + eps))` over the last axis, [..., D].

    The norm is float32; it is rounded to x's dtype before it is multiplied by the weight.
    """
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x32 * scale).to(x.dtype)


def rotary(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, S, d) for positions (B, S) (arXiv 2104.09864).

    Args:
        head_dim: d.
        theta: the base of the angles, which are float32.
        dtype: of the result.
    """
    power = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**power)  # (B, 1, S, d / 2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, S, d) by (B or 1, 1, S, d), pairs (i, i + d / 2) as in Hugging Face."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def route(logits: Tensor, num_experts_per_tok: int) -> Routes:
    """Softmax over all E experts in float32, top k, renormalised to sum 1: (T, E) -> Routes."""
    probabilities = logits.float().softmax(-1)
    weights, ids = probabilities.topk(num_experts_per_tok, -1)
    return Routes(ids, weights / weights.sum(-1, keepdim=True))
