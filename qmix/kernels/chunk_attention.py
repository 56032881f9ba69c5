"""Attention of a prompt's chunk on a CPU: the keys that all queries see, and the others, merged.

All queries of a chunk see most keys of a long text. Those need no mask, and heads that share them
are rows of one product: 0.49 of the time of one masked product at 32k. The others are the chunk's
own, those at the edge of a sliding window, and padding; they are masked. torch's kernel returns the
logarithm of each softmax's sum besides, by which two results become one.

Queries go in blocks, so that no mask grows with the square of a prompt. Knows no caches, no codes
and no gradients. Shape letters: see qmix.kernels.
"""

import torch
from torch import Tensor

from qmix.kernels.attention_mask import AttentionMask, visible
from qmix.kernels.gradients import needs_grad

_QUERIES = 512  # of a block
# Fewer queries, and fewer keys that all of them see, are masked with the others. A second call and
# merging cost more than they spare: 512 queries in bfloat16 took 1.3 times as long as one masked
# call with 1,024 such keys, 0.69 with 3,584; 16 queries 1.07 with 4,080.
_LEAST_QUERIES = 64
_LEAST_COMMON = 2048
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes these: a chunk of queries on a CPU, without gradients."""
    return (
        q.is_cpu
        and q.shape[2] >= _LEAST_QUERIES
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and not needs_grad(q, k, v)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attention of the last S of L columns: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    A query that sees no key gives zeros.

    Args:
        mask: without an attn_mask.
    """
    assert mask.attn_mask is None
    queries, keys = q.shape[2], k.shape[2]
    outs = []
    for first in range(0, queries, _QUERIES):
        last = min(first + _QUERIES, queries)
        end = keys - queries + last
        block, seen = mask.until(end).in_window(end, last - first)
        outs.append(
            _block(q[:, :, first:last], k[:, :, end - seen : end], v[:, :, end - seen : end], block)
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _block(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """`attend` over keys of which each is in the window of some query."""
    past = k.shape[2] - q.shape[2]
    first = _first_common(past, k.shape[2], mask)
    seen = None
    if first or mask.padding_mask is not None or past - first < _LEAST_COMMON:
        seen = visible(q.shape[2], k.shape[2], mask.window, mask.padding_mask, q.device)
    if past - first < _LEAST_COMMON:
        return _with_sums(q, k, v, seen)[0]
    common, common_sums = _grouped(q, k[:, :, first:past], v[:, :, first:past])
    k, v = (_without(t, first, past, axis=2) for t in (k, v))
    others, sums = _with_sums(
        q, k, v, None if seen is None else _without(seen, first, past, axis=3)
    )
    share = torch.sigmoid(sums - common_sums)[..., None]
    return common.float().lerp_(others.float(), share).to(q.dtype)


def _first_common(past: int, keys: int, mask: AttentionMask) -> int:
    """The first of the `past` keys from which on all queries see them all."""
    first = 0 if mask.window is None else max(0, keys - mask.window)
    if mask.padding_mask is not None:
        hidden = mask.padding_mask[:, :past].logical_not().any(0).nonzero()
        first = max(first, int(hidden[-1]) + 1) if len(hidden) else first
    return min(first, past)


def _without(t: Tensor, first: int, last: int, *, axis: int) -> Tensor:
    """t without [first, last) of an axis."""
    after = t.narrow(axis, last, t.shape[axis] - last)
    return torch.cat((t.narrow(axis, 0, first), after), axis) if first else after


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to all of k: (B, H, S, d), and the logarithms of the sums, (B, H, S)."""
    batch, heads, queries, width = q.shape
    groups = k.shape[1]
    rows = q.reshape(batch, groups, heads // groups * queries, width)
    out, sums = _flash(rows, k, v)
    return out.reshape(q.shape), sums.reshape(batch, heads, queries)


def _with_sums(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same over the keys that are seen, (B or 1, 1, S, L); None: as many as queries, causal."""
    if seen is None:
        return _flash(q, k, v, causal=True)
    added = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    out, sums = _flash(q, k, v, added)
    nothing = ~seen.any(-1)  # for which the kernel promises no numbers
    return out.masked_fill(nothing[..., None], 0.0), sums.masked_fill(nothing, -torch.inf)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """torch's kernel, with what is added to the scores, and the logarithms of the sums."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = kernel(q, k, v, is_causal=causal, attn_mask=added)
    return out, sums
