"""Speculation without a second model: ids are drafted from the text, and verified in one pass.

A draft is what followed the newest ids where they stood before. The loop chooses from the logits of
the pass one after another, by the same rules and the same random numbers as ever, and goes on as
long as it chooses what was drafted; the rest is dropped. So a draft changes how fast ids come, and
which ids only as far as a pass over several rows rounds otherwise than one over one row.
"""

import time
from typing import Protocol

import torch
from torch import Tensor

from qmix.generation.draft_counts import DraftCounts
from qmix.generation.drafted_text import DraftedText, Drafter
from qmix.kernels.moe import DECODE_TOKENS
from qmix.nn.cache import Cache, KVCache
from qmix.nn.cache_rows import CacheRows

MOST_DRAFTED = DECODE_TOKENS - 1


class Verifier(Protocol):
    """What a speculation asks of a model."""

    @property
    def device(self) -> torch.device: ...
    def next_logits(
        self,
        input_ids: Tensor,
        cache: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor: ...


class Speculation:
    """The steps of one row, some of them verified drafts."""

    def __init__(
        self,
        model: Verifier,
        cache: KVCache,
        drafter: Drafter,
        *,
        most: int,
    ) -> None:
        """
        Args:
            cache: of one row; the drafter's text is what it holds.
            most: ids of a draft, at most MOST_DRAFTED.
        """
        self._model, self._cache, self._times = model, cache, drafter.length.times
        self._text = DraftedText(cache, drafter, most=min(most, MOST_DRAFTED))
        self._passes = 0

    @property
    def counts(self) -> DraftCounts:
        """What has happened so far."""
        return DraftCounts(self._passes, self._text.drafted, self._text.accepted)

    def next_logits(self, newest: Tensor, left: int) -> Tensor:
        """Take the newest id (1, 1), which the loop has chosen: the logits (1, V) after it.

        Args:
            left: how many ids may still be chosen.
        """
        found = self._text.put(int(newest))
        if found is not None:
            return found
        draft = self._text.draft(left)
        start = time.perf_counter()
        if draft:
            logits = self._verified(newest, draft)
        else:
            logits = self._model.next_logits(newest.to(self._model.device), self._cache)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self._times.took(1 + len(draft), time.perf_counter() - start)
        self._passes += 1
        return logits

    def drop(self) -> None:
        """Forget the rest of a draft; the cache then is as if it had never been verified."""
        self._text.drop()

    def _verified(self, newest: Tensor, draft: list[int]) -> Tensor:
        """Run the newest id and a draft: the logits (1, V) after the newest id."""
        ids = torch.cat((newest, torch.tensor(draft)[:, None])).to(self._model.device)
        rows = CacheRows(self._text.rows(draft))
        try:
            logits = self._model.next_logits(ids, rows, None, rows.position_ids())
        except BaseException:
            self._text.drop()
            raise
        return self._text.take(draft, logits)
