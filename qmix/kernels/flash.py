"""Attention by the flash-attn package, where it is installed and fits.

Shape letters: B batch, H query heads, G key-value heads, S queries, L keys, d head width,
N tokens that are no padding. flash-attn wants (B, S, H, d), and window bounds that are inclusive:
W keys are `(W - 1, 0)`. (Passing (W, W), as transformers did until 2025, lets W + 1 keys be seen.)
"""

import importlib.util

import torch
from torch import Tensor

from qmix.errors import UnsupportedError

_WHERE = "attn_implementation"
_REMEDY = "Use attn_implementation='sdpa', which computes the same."


def check_installed() -> None:
    """Refuse where flash-attn cannot be imported.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("flash_attn") is None:
        raise UnsupportedError(
            "flash_attention_2 needs the flash-attn package, which is not installed",
            where=_WHERE,
            remedy=f"pip install flash-attn --no-build-isolation. {_REMEDY}",
        )


def check(q: Tensor) -> None:
    """Refuse queries (B, H, S, d) that flash-attn does not take.

    Raises:
        UnsupportedError: not on a GPU, not a half precision, or heads wider than 256.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return
    raise UnsupportedError(
        "flash_attention_2 does not fit this model",
        where=_WHERE,
        expected="float16 or bfloat16 on a CUDA device, heads of at most 256",
        found=f"{q.dtype} on {q.device.type}, heads of {q.shape[-1]}".replace("torch.", ""),
        remedy=_REMEDY,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    padding_mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the last S of L columns: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    Raises:
        UnsupportedError: a window over padding in the middle of a row, where tokens and columns are
            not counted alike.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    reach = (-1, 0) if window is None else (window - 1, 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor
    if padding_mask is None:
        out = flash_attn_func(q, k, v, dropout_p=dropout, causal=True, window_size=reach)
        return out.transpose(1, 2)
    binds = window is not None and k.shape[1] > window
    if binds and bool((padding_mask[:, 1:] != padding_mask[:, :-1]).sum(-1).gt(1).any()):
        raise UnsupportedError(
            "flash_attention_2 takes no window over padding inside a row",
            where=_WHERE,
            remedy=_REMEDY,
        )
    asked = padding_mask[:, -q.shape[1] :]
    kept = flash_attn_varlen_func(
        q[asked],
        k[padding_mask],
        v[padding_mask],
        *(_starts(asked), _starts(padding_mask)),
        *(int(asked.sum(-1).max()), int(padding_mask.sum(-1).max())),
        dropout_p=dropout,
        causal=True,
        window_size=reach,
    )
    out = q.new_zeros(q.shape)
    out[asked] = kept
    return out.transpose(1, 2)


def _starts(padding_mask: Tensor) -> Tensor:
    """Where each row's tokens begin among all that are kept, and their end: int32 (B + 1,)."""
    ends = padding_mask.sum(-1).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
