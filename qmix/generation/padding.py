"""What a batch of prompts must be, and moving its padding to the left.

A prompt is ids (B, P) or embeddings (B, P, D); its attention_mask is bool (B, P), False at padding.
Knows no model. Shape letters: see qmix.nn.
"""

import torch
from torch import Tensor

from qmix.errors import UsageError

_INTEGERS = (torch.int64, torch.int32)


def check_prompt(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise unless this is a prompt of ids with its mask.

    Raises:
        UsageError: not integers of shape (B, P), no token, a mask of another shape, or a row that
            is all padding.
    """
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.dim() != 2
        or input_ids.dtype not in _INTEGERS
        or not _has_values(input_ids)
    ):
        raise UsageError(
            "not a batch of token ids",
            where="input_ids",
            expected="an int64 or int32 tensor [batch, sequence]",
            found=_described(input_ids),
        )
    if not input_ids.numel():
        raise UsageError("the prompt is empty", where="input_ids", expected="at least one token")
    _check_mask(input_ids, attention_mask)


def check_embeds(inputs_embeds: Tensor | None, attention_mask: Tensor | None, width: int) -> None:
    """Raise unless this is a prompt of embeddings with its mask.

    Args:
        width: D, the model's hidden width.

    Raises:
        UsageError: not floats of shape (B, P, D), no position, a mask of another shape, or a row
            that is all padding.
    """
    if (
        not isinstance(inputs_embeds, Tensor)
        or inputs_embeds.dim() != 3
        or not inputs_embeds.is_floating_point()
        or not inputs_embeds.numel()
        or inputs_embeds.shape[-1] != width
    ):
        raise UsageError(
            "not a batch of embeddings",
            where="inputs_embeds",
            expected=f"a floating tensor [batch, sequence, {width}]",
            found=_described(inputs_embeds),
        )
    _check_mask(inputs_embeds, attention_mask)


def checked_mask(attention_mask: object) -> Tensor:
    """The attention mask, of any shape: 0 and 1 in any dtype, or floats to add to the scores.

    Raises:
        UsageError: it is not a tensor, or holds other values: of 2 axes others than 0 and 1, of 4
            axes NaN or positive infinity.
    """
    if (
        not isinstance(attention_mask, Tensor)
        or attention_mask.is_complex()
        or not _has_values(attention_mask)
    ):
        raise UsageError(
            "wrong type",
            where="attention_mask",
            expected="a dense tensor",
            found=_described(attention_mask),
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask
    added = attention_mask.dim() == 4 and attention_mask.is_floating_point()
    if added:
        good = attention_mask < float("inf")  # as is no NaN
    else:
        good = (attention_mask == 0) | (attention_mask == 1)
    if not bool(good.all()):
        raise UsageError(
            "wrong value",
            where="attention_mask",
            expected="finite floats or -inf" if added else "0 at padding and 1 elsewhere",
            found=attention_mask[~good].flatten()[0].item(),
        )
    return attention_mask


def left_padded(columns: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The columns and their mask with all padding moved to the left and the rest in its order."""
    order = attention_mask.to(torch.uint8).sort(dim=-1, stable=True).indices
    rows = torch.arange(attention_mask.shape[0], device=attention_mask.device)[:, None]
    return columns[rows.to(columns.device), order.to(columns.device)], attention_mask[rows, order]


def position_ids(attention_mask: Tensor | None, new: int) -> Tensor | None:
    """Positions (B, new) of the last `new` columns, not counting padding; None without padding."""
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def without_full_mask(attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask on `device`; None if it is all True, so that the faster unmasked attention runs."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.to(device)


def _check_mask(columns: Tensor, attention_mask: Tensor | None) -> None:
    if attention_mask is None:
        return
    if attention_mask.shape != columns.shape[:2]:
        raise UsageError(
            "wrong shape",
            where="attention_mask",
            expected=list(columns.shape[:2]),
            found=list(attention_mask.shape),
        )
    if not bool(attention_mask.any(-1).all()):
        raise UsageError("a row is all padding", where="attention_mask")


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _described(found: object) -> str:
    if not isinstance(found, Tensor):
        return type(found).__name__
    kind = "" if _has_values(found) else f" {'meta' if found.is_meta else found.layout}"
    return f"{found.dtype} {list(found.shape)}{kind}".removeprefix("torch.")
