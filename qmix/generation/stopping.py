"""When a row ends: end-of-sequence ids, stop strings in its text, criteria of the user.

Shape letters: B rows, L columns so far, V vocabulary. Knows no models.
"""

from typing import Protocol

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.text.detokenizer import StreamDetokenizer


class StoppingCriterion(Protocol):
    """Called like Hugging Face's, once a step, the newest ids included: which rows end here.

    One bool for all rows, or bool (B,).
    """

    def __call__(self, input_ids: Tensor, scores: Tensor, /) -> bool | Tensor: ...


class RowText:
    """The new text of one row: taken apart from its tokens, ended and trimmed at stop strings."""

    def __init__(
        self, words: StreamDetokenizer, eos_ids: tuple[int, ...], stops: tuple[str, ...]
    ) -> None:
        self.ended = False
        self._eos = eos_ids
        self._stops = stops
        self._held = ""  # may yet become a stop string
        self._words = words

    def put(self, token: int, *, last: bool) -> str:
        """The text that the token settles; all of it if it is the last; nothing after the end."""
        if self.ended:
            return ""
        text = self._held + self._words.put(token)
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        self.ended = last or token in self._eos
        if self.ended:
            return text + self._words.end()
        settled = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[settled:]
        return text[:settled]


def rows_to_stop(criterion: StoppingCriterion, input_ids: Tensor, scores: Tensor) -> Tensor:
    """The rows (B,) that a criterion ends, on the CPU.

    Raises:
        UsageError: it says neither yes or no, nor yes or no for each row.
    """
    rows = input_ids.shape[0]
    verdict = criterion(input_ids, scores)
    if isinstance(verdict, Tensor) and verdict.numel() in (1, rows):
        return verdict.bool().reshape(-1).expand(rows).cpu()
    if isinstance(verdict, bool):
        return torch.full((rows,), verdict)
    raise UsageError(
        "a stopping criterion gave no verdict",
        where="stopping_criteria",
        expected=f"a bool, or bools [{rows}]",
        found=repr(verdict)[:80],
    )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
