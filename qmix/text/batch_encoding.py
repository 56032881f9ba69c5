"""What a tokenizer's call returns: ids and attention mask of one text or a padded batch.

Knows ids only, neither text nor tokens. Imports torch only when arrays are asked for.
"""

from dataclasses import dataclass
from typing import Any, Self

from qmix.errors import UsageError, wrong_value


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (1 token, 0 padding), by key or as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}") from None

    def to(self, device: object, *, non_blocking: bool = False) -> Self:
        """Move the tensors to `device` in place; lists and arrays stay as they are."""
        for name, value in self.items():
            if hasattr(value, "device") and hasattr(value, "to"):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How rows of ids become a batch, in transformers' words.

    Attributes:
        return_tensors: "pt", "np" or None for lists.
        padding: True or "longest", "max_length", or False or "do_not_pad".
        truncation: cut longer rows; None: if max_length is given and padding is not.
        max_length: tokens, special ones included.
        pad_to_multiple_of: the padded length is a multiple of it.
        padding_side, truncation_side: "left" or "right".

    Raises:
        UsageError: options contradict each other, or a value is not one of these.
    """

    return_tensors: str | None = None
    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str = "left"
    truncation_side: str = "right"

    def __post_init__(self) -> None:
        if self.return_tensors not in (None, "pt", "np"):
            raise wrong_value("return_tensors", "'pt', 'np' or None", self.return_tensors)
        if self.padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise wrong_value("padding", "True, False, 'longest' or 'max_length'", self.padding)
        if self.truncation not in (None, True, False, "longest_first", "do_not_truncate"):
            raise wrong_value("truncation", "True or False", self.truncation)
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise wrong_value(name, "an integer of at least 1", value)
        check_side("padding_side", self.padding_side)
        check_side("truncation_side", self.truncation_side)
        if self.max_length is None:
            if self.truncates:
                raise wrong_value("max_length", "a number, because truncation=True", None)
            if self.padding == "max_length":
                raise wrong_value("max_length", "a number, because padding='max_length'", None)
        elif self.truncation in (False, "do_not_truncate") and not self.pads:
            raise wrong_value("truncation", "True, because max_length is given", self.truncation)

    @property
    def pads(self) -> bool:
        """Whether rows are padded."""
        return self.padding not in (False, "do_not_pad")

    @property
    def truncates(self) -> bool:
        """Whether rows that are too long are cut."""
        if self.truncation is None:
            return self.max_length is not None and not self.pads
        return self.truncation in (True, "longest_first")

    def truncated(self, row: list[int], before: list[int], after: list[int]) -> list[int]:
        """A row between its special tokens, of max_length at most.

        Args:
            row: ids of a text, without the special tokens around it.
            before, after: those, which stay.
        """
        if self.truncates and self.max_length is not None:
            space = max(self.max_length - len(before) - len(after), 0)
            row = (
                row[:space] if self.truncation_side == "right" else row[max(len(row) - space, 0) :]
            )
        return [*before, *row, *after]

    def batch(self, rows: list[list[int]], pad_token_id: int | None) -> BatchEncoding:
        """Rows as they are asked for: lists or arrays (rows, longest), padded or not.

        Raises:
            UsageError: rows of unequal length as an array, or padding without a pad token.
        """
        masks = [[1] * len(row) for row in rows]
        if self.pads:
            rows, masks = self._padded(rows, pad_token_id)
        if self.return_tensors is None:
            return BatchEncoding(input_ids=rows, attention_mask=masks)
        if len({len(row) for row in rows}) > 1:
            raise UsageError(
                "rows of unequal length do not make a tensor",
                where="return_tensors",
                remedy="Give padding=True.",
            )
        array = _array(self.return_tensors)
        return BatchEncoding(input_ids=array(rows), attention_mask=array(masks))

    def _padded(
        self, rows: list[list[int]], pad_token_id: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        length = max(map(len, rows))
        if self.padding == "max_length":
            length = max(length, self.max_length or 0)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded, masks = [], []
        for row in rows:
            missing, mask = length - len(row), [1] * len(row)
            if missing and pad_token_id is None:
                raise UsageError(
                    "the tokenizer has neither a pad nor an end token", where="padding"
                )
            pads, zeros = [pad_token_id or 0] * missing, [0] * missing
            left = self.padding_side == "left"
            padded.append(pads + row if left else row + pads)
            masks.append(zeros + mask if left else mask + zeros)
        return padded, masks


def check_side(name: str, side: object) -> None:
    """Refuse a side other than left and right.

    Raises:
        UsageError: another value; it names the option.
    """
    if side not in ("left", "right"):
        raise wrong_value(name, "'left' or 'right'", side)


def _array(kind: str) -> Any:
    """What makes an int64 array of rows: torch's or numpy's."""
    import torch

    if kind == "np":
        return lambda rows: torch.tensor(rows, dtype=torch.int64).numpy()
    return lambda rows: torch.tensor(rows, dtype=torch.int64)
