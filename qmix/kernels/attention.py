"""Grouped-query attention over keys and values of any length, causal and windowed.

One table, `attn_implementation -> function`; every entry computes the same. Knows nothing of
caches: the S queries are the last S of the L columns. Shape letters: see qmix.kernels.
"""

import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UnsupportedError, UsageError
from qmix.kernels import chunk_attention, flash, kv_rows
from qmix.kernels.attention_mask import CAUSAL, AttentionMask, visible
from qmix.kernels.gradients import needs_grad

Implementation = Literal["eager", "sdpa", "flash_attention_2", "triton"]

_NUMBERS = 4 << 20  # keys, and as many values, that lie dequantized at a time


class Attention(Protocol):
    """One entry of the table: (B, H, S, d) with keys and values (B, G, L, d) -> (B, H, S, d)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float, /
    ) -> Tensor: ...


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Plain softmax attention in float32: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    A query that sees no key gives zeros.

    Args:
        visible: bool, broadcast to (B, H, S, L).
    """
    groups = q.shape[1] // k.shape[1]
    k32 = k.float().repeat_interleave(groups, 1)
    v32 = v.float().repeat_interleave(groups, 1)
    scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v32).to(q.dtype)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask = CAUSAL, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention step by step, with its weights: (B, H, S, d) and (B, H, S, L).

    k and v may be rows of codes, all of which become numbers: the weights take more memory. The
    softmax is float32. Heads that share keys are rows of one matrix product; keys are not repeated.
    A query that sees no key gives zeros.
    """
    k, v = kv_rows.dequantized(k, q.dtype), kv_rows.dequantized(v, q.dtype)
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = heads // kv_heads * queries
    scores = (q.reshape(batch, kv_heads, rows, width) @ k.transpose(-1, -2)) / math.sqrt(width)
    scores = scores.view(batch, heads, queries, keys).float()
    seen, bias = _seen_and_bias(queries, keys, mask, q.device)
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype)
    dropped = F.dropout(weights, dropout) if dropout else weights
    out = dropped.reshape(batch, kv_heads, rows, keys) @ v
    return out.view(batch, heads, queries, width), weights


def eager(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """`attention_with_weights` without its weights."""
    return attention_with_weights(q, k, v, mask, dropout)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention; it gets no mask where causality alone decides."""
    queries, keys, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    plain = mask.only_causal(keys)
    if plain and queries == 1:
        return _sdpa_single_query(q, k, v, dropout)
    if plain and queries == keys:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped, dropout_p=dropout
        )
    if mask.attn_mask is None and not dropout and chunk_attention.takes(q, k, v):
        return chunk_attention.attend(q, k, v, mask)
    seen, bias = _seen_and_bias(queries, keys, mask, q.device)
    attn_mask = seen if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, enable_gqa=grouped, dropout_p=dropout
    )
    if not mask.is_explicit:
        return out
    # A row without a visible key (padding) is NaN or garbage in some backends.
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float
) -> Tensor:
    """The flash-attn package, where it fits."""
    if mask.attn_mask is not None:
        raise UnsupportedError(
            "flash_attention_2 takes no 4-D mask",
            where="attn_implementation",
            remedy="Use sdpa or eager.",
        )
    flash.check(q)
    return flash.attend(
        q, k, v, window=mask.window, padding_mask=mask.padding_mask, dropout=dropout
    )


def triton(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """Our own kernels, on a GPU, where they fit."""
    if not q.is_cuda or mask.attn_mask is not None or dropout or needs_grad(q, k, v):
        raise UnsupportedError(
            "the Triton attention kernel has no gradients, no dropout and takes no 4-D mask",
            where="attn_implementation",
            expected="a CUDA device, inference",
            found=q.device.type,
            remedy="Use sdpa, which computes the same.",
        )
    from qmix.kernels.gpu import attention

    return attention.attend(q, k, v, window=mask.window, padding_mask=mask.padding_mask)


_IMPLEMENTATIONS: Mapping[Implementation, Attention] = {
    "eager": eager,
    "sdpa": sdpa,
    "flash_attention_2": flash_attention_2,
    "triton": triton,
}


def checked_implementation(name: str | None) -> Implementation:
    """The implementation of a name; None: sdpa.

    Raises:
        UsageError: there is no implementation of this name.
        UnsupportedError: the device or the package that it needs is missing.
    """
    if name is None:
        return "sdpa"
    known: Mapping[str, Implementation] = {each: each for each in get_args(Implementation)}
    if name not in known:
        raise UsageError(
            "no such attention",
            where="attn_implementation",
            expected=", ".join(known),
            found=repr(name)[:80],
        )
    if name == "triton" and not torch.cuda.is_available():
        raise UnsupportedError(
            "the Triton attention kernel needs a CUDA device, and there is none",
            where="attn_implementation",
            remedy="Use sdpa, which computes the same.",
        )
    if name == "flash_attention_2":
        flash.check_installed()
    return known[name]


def attend_with(
    implementation: Implementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = CAUSAL,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the last S columns over all L: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    Args:
        k, v: may be rows of codes [B, G, L, d + 4].
        implementation: which entry of the table; all of them compute the same.
        dropout: the probability that an attention weight is zeroed.
    """
    mask, seen = mask.in_window(k.shape[2], q.shape[2])
    if seen < k.shape[2]:
        k, v = k[:, :, -seen:], v[:, :, -seen:]
    attend = _IMPLEMENTATIONS[implementation]
    if kv_rows.is_rows(k) and implementation != "triton":
        return _by_key_heads(attend, q, k, v, mask, dropout)
    return attend(q, k, v, mask, dropout)


def _by_key_heads(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float
) -> Tensor:
    """`attend` over rows of codes, of which a few heads at a time become numbers."""
    batch, shared, keys = k.shape[:3]
    group_heads = q.shape[1] // shared
    step = max(1, _NUMBERS // (batch * keys * q.shape[3]))
    parts = []
    for first in range(0, shared, step):
        last = min(first + step, shared)
        own = slice(first * group_heads, last * group_heads)
        keys_of, values_of = (kv_rows.dequantized(t[:, first:last], q.dtype) for t in (k, v))
        parts.append(attend(q[:, own], keys_of, values_of, mask.of_heads(own), dropout))
    return torch.cat(parts, 1)


def _seen_and_bias(
    queries: int, keys: int, mask: AttentionMask, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which keys are seen (bool) and what is added to their scores; broadcast to (B, H, S, L)."""
    if mask.attn_mask is None:
        return visible(queries, keys, mask.window, mask.padding_mask, device).to(device), None
    attn_mask = mask.attn_mask.to(device)
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    return attn_mask > torch.finfo(attn_mask.dtype).min, attn_mask


def _sdpa_single_query(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """One query: heads that share keys become rows of one product (2 to 9 times faster on CPU)."""
    batch, heads, _, width = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, k, v, dropout_p=dropout)
    return out.view(batch, heads, 1, width)
