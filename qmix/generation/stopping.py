"""When a row ends: end-of-sequence ids, stop strings in its text, the caller's criteria.

Knows no models. Shape letters: see qmix.nn.
"""

from typing import Protocol

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.text.detokenizer import StreamDetokenizer


class StoppingCriterion(Protocol):
    """Called like Hugging Face's, once per step: which rows end with the newest ids.

    Takes the ids so far (B, L), the newest included, and the scores (B, V) that they were chosen
    from. Returns one bool for all rows, or bool (B,).
    """

    def __call__(self, input_ids: Tensor, scores: Tensor, /) -> bool | Tensor: ...


class RowText:
    """The new text of one row: decoded from its tokens, and cut at the first stop string."""

    def __init__(
        self, detokenizer: StreamDetokenizer, eos_ids: tuple[int, ...], stops: tuple[str, ...]
    ) -> None:
        self.ended = False
        self.stop: str | None = None  # that ended it
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._stops = stops
        self._pending = ""  # may yet become a stop string

    def put(self, token: int, *, last: bool) -> str:
        """The text that is certain after this token: all if it is the last, none after the end.

        A row that is only the last of its budget has not ended by itself.
        """
        if self.ended:
            return ""
        text = self._pending + self._detokenizer.put(token)
        cuts = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if cuts:
            self.ended = True
            cut, self.stop = min(cuts)
            return text[:cut]
        self.ended = token in self._eos_ids
        if self.ended or last:
            return text + self._detokenizer.end()
        certain = len(text) - max((overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[certain:]
        return text[:certain]


def rows_to_stop(criterion: StoppingCriterion, input_ids: Tensor, scores: Tensor) -> Tensor:
    """The rows that a criterion ends: bool (B,), on the CPU.

    Raises:
        UsageError: it returns neither a bool nor one for each row.
    """
    rows = input_ids.shape[0]
    verdict = criterion(input_ids, scores)
    if isinstance(verdict, Tensor) and verdict.numel() in (1, rows):
        return verdict.bool().reshape(-1).expand(rows).cpu()
    if isinstance(verdict, bool):
        return torch.full((rows,), verdict)
    raise UsageError(
        "a stopping criterion returned no bool",
        where="stopping_criteria",
        expected=f"a bool, or bools [{rows}]",
        found=repr(verdict)[:80],
    )


def overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
