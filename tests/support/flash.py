"""flash-attn's documented arithmetic, for machines without it."""

import types

import torch

from qmix.kernels.attention import reference


def flash_attn():
    """The package's arithmetic spelled out: (B, S, H, d), inclusive bounds, aligned at the end."""

    def one(q, k, v, causal, window_size):
        assert causal
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        queries, keys = q.shape[2], k.shape[2]
        i = torch.arange(keys - queries, keys)[:, None]
        j = torch.arange(keys)
        left, right = window_size
        seen = (j <= i + right) & (j >= i - left if left >= 0 else j >= 0)
        return reference(q, k, v, seen[None, None])[0].transpose(0, 1)

    def whole(q, k, v, dropout_p=0.0, causal=False, window_size=(-1, -1)):
        return torch.stack([one(*row, causal, window_size) for row in zip(q, k, v, strict=True)])

    def ragged(
        q, k, v, starts_q, starts_k, most_q, most_k, dropout_p=0.0, causal=False, window_size=None
    ):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert most_q == int(starts_q.diff().max())
        assert most_k == int(starts_k.diff().max())
        rows = range(len(starts_q) - 1)
        return torch.cat(
            [
                one(
                    q[starts_q[b] : starts_q[b + 1]],
                    k[starts_k[b] : starts_k[b + 1]],
                    v[starts_k[b] : starts_k[b + 1]],
                    causal,
                    window_size,
                )
                for b in rows
                if starts_q[b] < starts_q[b + 1]
            ]
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = whole
    module.flash_attn_varlen_func = ragged
    return module
