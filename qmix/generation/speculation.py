"""Speculation without a second model: ids are drafted from the text, and verified in one pass.

A draft is what followed the newest ids where they stood before. A pass over the newest id and the
draft gives the logits after each of them. The loop chooses from these one after another, by the
same rules and the same random numbers as ever, and goes on as long as it chooses what was drafted;
the rest is dropped. So a draft changes how fast ids come, and which ids only as far as a pass over
several rows rounds otherwise than one over one row.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from qmix.generation.draft_counts import DraftCounts
from qmix.generation.draft_length import DraftLength
from qmix.generation.prompt_lookup import PromptLookup
from qmix.kernels.moe import DECODE_TOKENS
from qmix.nn.cache import Cache, KVCache
from qmix.nn.cache_ahead import CacheAhead

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


class Drafter:
    """Where drafts come from and how long they are: what a session keeps from reply to reply."""

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.length = DraftLength()


class Speculation:
    """The steps of one row, some of them verified drafts.

    Attributes:
        counts: what has happened so far.
    """

    def __init__(
        self,
        model: Verifier,
        cache: KVCache,
        drafter: Drafter,
        *,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            cache: of one row; the drafter's text is what it holds.
            most: ids of a draft, at most MOST_DRAFTED.
        """
        self.counts = DraftCounts()
        self._model, self._cache, self._drafter = model, cache, drafter
        self._most = min(most, MOST_DRAFTED, (cache.window or DECODE_TOKENS) - 1)
        self._clock = clock
        self._ahead: CacheAhead | None = None
        self._draft: list[int] = []  # what has been verified and not yet chosen
        self._logits: list[Tensor] = []  # after each of them

    def next_logits(self, newest: int, left: int) -> Tensor:
        """Take the newest id, which the loop has chosen: the logits (1, V) after it.

        Args:
            left: how many ids may still be chosen.
        """
        lookup, predicted = self._drafter.lookup, self._drafter.lookup.next_id
        if predicted is not None:
            self._drafter.length.observe(lookup.matched, accepted=newest == predicted)
        lookup.put(newest)
        if self._draft and self._draft.pop(0) == newest:
            assert self._ahead is not None
            self._ahead.keep()
            self.counts = replace(self.counts, accepted=self.counts.accepted + 1)
            return self._logits.pop(0)
        self.drop()
        draft: list[int] = []
        if lookup.matched:
            count = self._drafter.length.best(lookup.matched, min(self._most, left - 1))
            draft = lookup.draft(count)
        return self._passed(newest, draft)

    def drop(self) -> None:
        """Forget the rest of a draft; the cache then is as if it had never been verified."""
        if self._ahead is not None:
            self._ahead.drop()
        self._ahead, self._draft, self._logits = None, [], []

    def _passed(self, newest: int, draft: list[int]) -> Tensor:
        """Run the newest id and a draft: the logits (1, V) after the newest id."""
        start = self._clock()
        ids = torch.tensor([newest, *draft], device=self._model.device)[:, None]
        if draft:
            logits = self._verified(ids)
            self._draft, self._logits = draft, list(logits[1:, None])
        else:
            logits = self._model.next_logits(ids, self._cache, None, None)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self._drafter.length.took(len(ids), self._clock() - start)
        self.counts = replace(
            self.counts,
            passes=self.counts.passes + 1,
            drafted=self.counts.drafted + len(draft),
        )
        return logits[:1]

    def _verified(self, ids: Tensor) -> Tensor:
        """Ids (S, 1), the newest one and a draft: the logits (S, V) after each.

        The cache counts the first of them.
        """
        self._ahead = ahead = CacheAhead(self._cache, len(ids))
        rows = ahead.rows
        try:
            logits = self._model.next_logits(ids, rows, None, rows.position_ids())
        except BaseException:
            self.drop()
            raise
        ahead.keep()
        return logits
