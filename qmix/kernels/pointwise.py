"""Pointwise pieces of a layer: RMSNorm, rotary embedding, router.

Shape letters: B batch, S sequence, H heads, d head width, T tokens, E experts, K chosen.
"""

import torch
from torch import Tensor

from qmix.kernels.moe import Routes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`w * (x * rsqrt(mean(x^2) + eps))`, the variance in float32, w multiplied after the cast back."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x32 * scale).to(x.dtype)


def rotary(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, S, d) of the positions (B, S); angles in float32 (arXiv 2104.09864)."""
    power = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**power)  # (B, 1, S, d / 2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, S, d) in Hugging Face's half-split order: pairs are (i, i + d / 2)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def route(logits: Tensor, num_experts_per_tok: int) -> Routes:
    """Softmax over all E experts in float32, top K, renormalised to sum 1: (T, E) -> Routes."""
    probabilities = logits.float().softmax(-1)
    weights, ids = probabilities.topk(num_experts_per_tok, -1)
    return Routes(ids, weights / weights.sum(-1, keepdim=True))
