"""What a tokenizer's call returns: ids and attention mask of one text or a padded batch.

Knows ids only, neither text nor tokens. Imports torch only when tensors are asked for.
"""

from typing import Any, Self

from qmix.errors import UsageError, wrong_value


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (1 token, 0 padding), by key or as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}") from None

    def to(self, device: object) -> Self:
        """Move the tensors to `device` in place; lists stay as they are."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device)
        return self


def check_options(
    return_tensors: str | None, padding: bool | str, truncation: bool | None, max_length: int | None
) -> None:
    """Refuse options that contradict each other or that qmix does not have.

    Raises:
        UsageError: the option is named.
    """
    if return_tensors not in (None, "pt"):
        raise wrong_value("return_tensors", "'pt' or None", return_tensors)
    if padding not in (True, False, "longest"):
        raise wrong_value("padding", "True, False or 'longest'", padding)
    if truncation not in (None, True, False):
        raise wrong_value("truncation", "True or False", truncation)
    if max_length is None:
        if truncation:
            raise wrong_value("max_length", "a number, because truncation=True", max_length)
    elif truncation is False:
        raise wrong_value("truncation", "True, because max_length is given", truncation)
    elif isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise wrong_value("max_length", "an integer of at least 1", max_length)


def check_padding_side(side: str) -> None:
    """Refuse a side other than left and right.

    Raises:
        UsageError: another value.
    """
    if side not in ("left", "right"):
        raise wrong_value("padding_side", "'left' or 'right'", side)


def pad(
    rows: list[list[int]], pad_token_id: int | None, side: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Pad rows to the longest; returns the rows and their attention masks.

    Raises:
        UsageError: there is no pad token, or another side than left and right.
    """
    if pad_token_id is None:
        raise UsageError("the tokenizer has neither a pad nor an end token", where="padding")
    check_padding_side(side)
    longest = max(map(len, rows))
    padded, masks = [], []
    for row in rows:
        missing, mask = longest - len(row), [1] * len(row)
        left = side == "left"
        padded.append([pad_token_id] * missing + row if left else row + [pad_token_id] * missing)
        masks.append([0] * missing + mask if left else mask + [0] * missing)
    return padded, masks


def as_tensors(rows: list[list[int]], masks: list[list[int]]) -> BatchEncoding:
    """Rows and masks as int64 tensors (rows, longest).

    Raises:
        UsageError: the rows differ in length.
    """
    import torch

    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            "rows of unequal length do not make a tensor",
            where="return_tensors",
            remedy="Give padding=True.",
        )
    return BatchEncoding(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        attention_mask=torch.tensor(masks, dtype=torch.int64),
    )
