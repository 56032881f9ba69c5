"""Logits processors: rules that lower or exclude scores by what stands in the context.

Shape letters: B rows, L context columns, V vocabulary. A processor is anything called like
Hugging Face's: `(ids so far (B, L), scores (B, V)) -> scores (B, V)`. Knows no models.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LogitsProcessor(Protocol):
    """Called once a step, after the penalties and before the temperature."""

    def __call__(self, input_ids: Tensor, scores: Tensor, /) -> Tensor: ...


def without_repeated_ngrams(
    scores: Tensor, context: Tensor, attention_mask: Tensor | None, size: int
) -> Tensor:
    """Exclude every id that would complete n ids standing in the row already.

    Args:
        attention_mask: bool (B, L), False at padding, which is part of no n-gram.
        size: n, at least 1.
    """
    if context.shape[1] < size:
        return scores
    ngrams = context.unfold(1, size, 1)  # (B, L - n + 1, n)
    follows = context[:, context.shape[1] - size + 1 :]  # the n - 1 newest
    found = (ngrams[:, :, :-1] == follows[:, None]).all(-1)
    if attention_mask is not None:
        found &= attention_mask.unfold(1, size, 1).all(-1)
    banned = torch.zeros_like(scores, dtype=torch.int32)
    banned = banned.scatter_add(1, ngrams[:, :, -1], found.int())
    return scores.masked_fill(banned > 0, -math.inf)


def without_words(
    scores: Tensor, context: Tensor, words: Sequence[Sequence[int]], eos: Sequence[int]
) -> Tensor:
    """Exclude the last id of each word whose other ids are the newest of the row.

    A word that is one end-of-sequence id is let through, as in transformers: it could never end.
    """
    banned = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        *start, last = word
        if (not start and last in eos) or len(start) > context.shape[1] or last >= scores.shape[1]:
            continue
        newest = context[:, context.shape[1] - len(start) :]
        banned[:, last] |= (newest == torch.tensor(start, device=context.device)).all(-1)
    return scores.masked_fill(banned, -math.inf)


def without_ids(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Exclude ids, those outside the vocabulary ignored."""
    known = [index for index in ids if 0 <= index < scores.shape[-1]]
    return scores.index_fill(-1, torch.tensor(known, device=scores.device).long(), -math.inf)
