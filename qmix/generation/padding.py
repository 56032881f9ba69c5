"""What a batch of prompts must be, and its padding moved to the left, where nothing follows it.

Shape letters: B rows, P prompt columns, D hidden width. A prompt is ids (B, P) or embeddings
(B, P, D); its mask `attention_mask` is bool (B, P), False at padding. Knows no model.
"""

import torch
from torch import Tensor

from qmix.errors import UsageError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_prompt(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse what is no prompt of ids.

    Raises:
        UsageError: not integers of shape (B, P), no token, or a mask of another shape.
    """
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.dim() != 2
        or input_ids.dtype not in _INTEGERS
    ):
        raise UsageError(
            "not a batch of token ids",
            where="input_ids",
            expected="an integer tensor [batch, sequence]",
            found=_described(input_ids),
        )
    if not input_ids.numel():
        raise UsageError("the prompt is empty", where="input_ids", expected="at least one token")
    _check_mask(input_ids, attention_mask)


def check_embeds(inputs_embeds: Tensor | None, attention_mask: Tensor | None, width: int) -> None:
    """Refuse what is no prompt of embeddings of the model's width D.

    Raises:
        UsageError: not floats of shape (B, P, D), no position, or a mask of another shape.
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
    """An attention mask of any form, if it is a tensor.

    Raises:
        UsageError: it is none.
    """
    if isinstance(attention_mask, Tensor):
        return attention_mask
    raise UsageError(
        "wrong type", where="attention_mask", expected="a tensor", found=_described(attention_mask)
    )


def left_padded(columns: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with all padding moved to the left, the rest in its order."""
    order = attention_mask.to(torch.uint8).sort(dim=-1, stable=True).indices
    rows = torch.arange(attention_mask.shape[0], device=attention_mask.device)[:, None]
    return columns[rows.to(columns.device), order.to(columns.device)], attention_mask[rows, order]


def position_ids(attention_mask: Tensor | None, new: int) -> Tensor | None:
    """Positions of the last `new` columns, padding not counted; None without padding."""
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def without_full_mask(attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """All-ones masks are dropped, so that the unmasked, faster attention serves them."""
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


def _described(found: object) -> str:
    if not isinstance(found, Tensor):
        return type(found).__name__
    return f"{found.dtype} {list(found.shape)}".removeprefix("torch.")
