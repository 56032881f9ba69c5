"""Attention by the flash-attn package, where it is installed and fits.

flash-attn takes (B, S, H, d), and window bounds that are inclusive: a window of W keys is
`(W - 1, 0)`. (Passing (W, W), as transformers did until 2025, shows W + 1 keys.) Shape letters:
see qmix.kernels.
"""

import importlib.util

import torch
from torch import Tensor

from qmix.errors import UnsupportedError

_WHERE = "attn_implementation"
_REMEDY = "Use attn_implementation='sdpa', which computes the same."


def check_installed() -> None:
    """Raise unless flash-attn can be imported.

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
    """Raise unless flash-attn takes queries (B, H, S, d) like these.

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

    Args:
        window: each query sees this many keys, itself included; None: all before it.
        padding_mask: bool (B, L), False at padding; None: no padding.
        dropout: the probability that an attention weight is zeroed.

    Raises:
        UnsupportedError: a window over padding inside a row: flash-attn's windows count tokens, not
            columns.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    window_size = (-1, 0) if window is None else (window - 1, 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor
    if padding_mask is None:
        out = flash_attn_func(q, k, v, dropout_p=dropout, causal=True, window_size=window_size)
        return out.transpose(1, 2)
    windowed = window is not None and k.shape[1] > window
    if windowed and bool((padding_mask[:, 1:] != padding_mask[:, :-1]).sum(-1).gt(1).any()):
        raise UnsupportedError(
            "flash_attention_2 takes no window over padding inside a row",
            where=_WHERE,
            remedy=_REMEDY,
        )
    query_mask = padding_mask[:, -q.shape[1] :]
    attended = flash_attn_varlen_func(
        q[query_mask],
        k[padding_mask],
        v[padding_mask],
        *(_row_starts(query_mask), _row_starts(padding_mask)),
        *(int(query_mask.sum(-1).max()), int(padding_mask.sum(-1).max())),
        dropout_p=dropout,
        causal=True,
        window_size=window_size,
    )
    out = q.new_zeros(q.shape)
    out[query_mask] = attended
    return out.transpose(1, 2)


def _row_starts(padding_mask: Tensor) -> Tensor:
    """Where each row's tokens begin among the tokens of all rows, and the end: int32 (B + 1,)."""
    ends = padding_mask.sum(-1).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
