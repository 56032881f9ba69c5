"""Grouped-query attention over keys and values of any length, causal and windowed.

Shape letters: B batch, H query heads, G key-value heads, S queries, L keys, d head width.
One table: attn_implementation -> function. Knows nothing of caches: the queries are the last S of
the L columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UnsupportedError, UsageError
from qmix.kernels import flash

Implementation = Literal["eager", "sdpa", "flash_attention_2", "triton"]


@dataclass(frozen=True, eq=False)
class Sight:
    """What each query may see, and how much of it is dropped while training.

    Attributes:
        window: each query sees this many keys, itself included; None sees all before it.
        keep: bool (B, L), False at padding; None keeps all.
        mask: (B or 1, H or 1, S, L) instead of window, keep and causality: bool, True is seen, or
            floats that are added to the scores; None for the usual.
        dropout: the share of attention weights that is zeroed.
    """

    window: int | None = None
    keep: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0


def visible(
    queries: int,
    keys: int,
    window: int | None,
    keep: Tensor | None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query may see: bool (B or 1, 1, S, L), on `device` or where `keep` is.

    The S queries are the last columns of the L keys. Key j is visible to query i exactly if
    `i - window < j <= i` and `keep[:, j]` (bool (B, L), None = all).
    """
    if keep is not None:
        device = keep.device
    j = torch.arange(keys, device=device)
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = j <= i
    if window is not None:
        mask = mask & (j > i - window)
    if keep is None:
        return mask[None, None]
    return mask[None, None] & keep[:, None, None, :]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain softmax attention in float32: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    A query that sees no key gives zeros.
    """
    groups = q.shape[1] // k.shape[1]
    k32 = k.float().repeat_interleave(groups, 1)
    v32 = v.float().repeat_interleave(groups, 1)
    scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v32).to(q.dtype)


def weighted(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Attention in plain words, with its weights: (B, H, S, d) and (B, H, S, L).

    The softmax is float32. Heads that share keys are rows of one product; keys are not repeated. A
    query that sees no key gives zeros.
    """
    batch, heads, queries, width = q.shape
    shared, keys = k.shape[1], k.shape[2]
    rows = heads // shared * queries
    scores = (q.reshape(batch, shared, rows, width) @ k.transpose(-1, -2)) / math.sqrt(width)
    scores = scores.view(batch, heads, queries, keys).float()
    seen, added = _mask(queries, keys, sight, q.device)
    scores = (scores if added is None else scores + added).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype)
    dropped = F.dropout(weights, sight.dropout) if sight.dropout else weights
    out = dropped.reshape(batch, shared, rows, keys) @ v
    return out.view(batch, heads, queries, width), weights


def eager(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """`weighted` without its weights."""
    return weighted(q, k, v, sight)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """torch's scaled_dot_product_attention; no mask where causality alone says it."""
    queries, keys, shared = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    windowed = sight.window is not None and keys > sight.window
    plain = sight.mask is None and sight.keep is None and not windowed
    if plain and queries == 1:
        return _decode(q, k, v, sight.dropout)
    if plain and queries == keys:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=shared, dropout_p=sight.dropout
        )
    seen, added = _mask(queries, keys, sight, q.device)
    mask = seen if added is None else added.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=shared, dropout_p=sight.dropout
    )
    if sight.mask is None and sight.keep is None:
        return out
    # A row without a visible key (padding) is NaN or garbage in some backends.
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """The flash-attn package, where it fits."""
    if sight.mask is not None:
        raise UnsupportedError(
            "flash_attention_2 takes no 4-D mask",
            where="attn_implementation",
            remedy="Use sdpa or eager.",
        )
    flash.check(q)
    return flash.attend(q, k, v, window=sight.window, keep=sight.keep, dropout=sight.dropout)


def triton(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Our own kernels, on a GPU, where they fit."""
    if not q.is_cuda or sight.mask is not None or sight.dropout or traced(q, k, v):
        raise UnsupportedError(
            "the Triton attention kernel has no gradients, no dropout and takes no 4-D mask",
            where="attn_implementation",
            expected="a CUDA device, inference",
            found=q.device.type,
            remedy="Use sdpa, which means the same.",
        )
    from qmix.kernels.gpu import attention

    return attention.attend(q, k, v, window=sight.window, keep=sight.keep)


def traced(*tensors: Tensor) -> bool:
    """Whether gradients are asked for."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


_ROWS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Sight], Tensor]] = {
    "eager": eager,
    "sdpa": sdpa,
    "flash_attention_2": flash_attention_2,
    "triton": triton,
}


def named(name: str | None) -> Implementation:
    """The implementation of a name; None is the default.

    Raises:
        UsageError: no such name. UnsupportedError: what it needs is not here.
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
            remedy="Use sdpa, which means the same.",
        )
    if name == "flash_attention_2":
        flash.check_installed()
    return known[name]


def reach(keys: int, queries: int, window: int | None) -> int:
    """How many of the keys any query sees: older ones are outside every window."""
    return keys if window is None else min(keys, window + queries - 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    keep: Tensor | None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    implementation: Implementation = "sdpa",
) -> Tensor:
    """Attention of the last S columns over all L: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    Args:
        window, keep, mask, dropout: see Sight.
        implementation: which row of the table; all of them mean the same.
    """
    seen = reach(k.shape[2], q.shape[2], window)
    if mask is None and seen < k.shape[2]:
        k, v = k[:, :, -seen:], v[:, :, -seen:]
        keep = keep[:, -seen:] if keep is not None else None
    return _ROWS[implementation](q, k, v, Sight(window, keep, mask, dropout))


def _mask(
    queries: int, keys: int, sight: Sight, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which keys are seen, bool, and what is added to their scores; broadcast to (B, H, S, L)."""
    if sight.mask is None:
        return visible(queries, keys, sight.window, sight.keep, device).to(device), None
    mask = sight.mask.to(device)
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min, mask


def _decode(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """One query: the heads that share keys become rows of one product (2 to 9 times faster on CPU)."""
    batch, heads, _, width = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, k, v, dropout_p=dropout)
    return out.view(batch, heads, 1, width)
