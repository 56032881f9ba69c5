"""Logits processors: rules that exclude ids by what a row already contains.

A processor is anything called like Hugging Face's: `(ids so far (B, L), scores (B, V)) -> scores
(B, V)`. Knows no models. Shape letters: see qmix.nn.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LogitsProcessor(Protocol):
    """Called once per step, after the penalties and before the temperature."""

    def __call__(self, input_ids: Tensor, scores: Tensor, /) -> Tensor: ...


def without_repeated_ngrams(
    scores: Tensor, input_ids: Tensor, attention_mask: Tensor | None, size: int
) -> Tensor:
    """Exclude every id that would repeat an n-gram of its row.

    Args:
        input_ids: ids so far (B, L).
        attention_mask: bool (B, L), False at padding, which is part of no n-gram.
        size: n, at least 1.
    """
    if input_ids.shape[1] < size:
        return scores
    ngrams = input_ids.unfold(1, size, 1)  # (B, L - n + 1, n)
    newest = input_ids[:, input_ids.shape[1] - size + 1 :]  # n - 1 ids
    matches = (ngrams[:, :, :-1] == newest[:, None]).all(-1)
    if attention_mask is not None:
        matches &= attention_mask.unfold(1, size, 1).all(-1)
    banned = torch.zeros_like(scores, dtype=torch.int32)
    banned = banned.scatter_add(1, ngrams[:, :, -1], matches.int())
    return scores.masked_fill(banned > 0, -math.inf)


def without_words(
    scores: Tensor, input_ids: Tensor, words: Sequence[Sequence[int]], eos: Sequence[int]
) -> Tensor:
    """Exclude the last id of each word whose other ids are the newest of the row.

    A word that is a single end-of-sequence id is ignored, as in transformers: the row could never
    end.

    Args:
        input_ids: ids so far (B, L).
    """
    banned = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        *start, last = word
        if (
            (not start and last in eos)
            or len(start) > input_ids.shape[1]
            or last >= scores.shape[1]
        ):
            continue
        newest = input_ids[:, input_ids.shape[1] - len(start) :]
        banned[:, last] |= (newest == torch.tensor(start, device=input_ids.device)).all(-1)
    return scores.masked_fill(banned, -math.inf)


def without_ids(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Exclude ids; those outside the vocabulary are ignored."""
    known = [index for index in ids if 0 <= index < scores.shape[-1]]
    return scores.index_fill(-1, torch.tensor(known, device=scores.device).long(), -math.inf)
