"""DecodePass: the newest ids of several slots in one pass, and drafts of some beside them.

A draft is a row more for each of its ids, in the cache of its slot. It is made where the ids that
it promises outweigh what the rows cost, those of the other slots counted; so the more requests run,
the fewer drafts there are. Only as many rows as are computed each as if it were alone: drafts
change no id. Knows no queue and no ends of requests.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.generation.drafted_text import DraftedText, Drafter
from qmix.generation.pass_times import PassTimes
from qmix.kernels.moe import DECODE_TOKENS
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.cache_rows import CacheRows
from qmix.serving.running import Running
from qmix.serving.slot import Slot


class DecodePass:
    """The passes of one scheduler.

    Attributes:
        drafted: ids of drafts so far.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        slots: Sequence[Slot],
        *,
        speculate: bool,
    ) -> None:
        """
        Args:
            speculate: make drafts, if the model has passes that change no id.
        """
        self.drafted = 0
        self._model, self._clock = model, time.perf_counter
        self._most = min(model.exact_rows(), DECODE_TOKENS) if speculate else 1
        self._times = PassTimes()
        # A slot drafts from its own request alone: what others wrote must not show in its times.
        self._drafters = {slot: Drafter(self._times, most_ids=0) for slot in slots}

    def begin(self, slot: Slot) -> None:
        """Have the texts of a slot's request drafted from, if drafts are made for it."""
        running = slot.running
        if self._most > 1 and not running.ticket.request.expert_counts:
            drafter = self._drafters[slot]
            drafter.lookup.begin(running.ids.tolist())
            slot.drafts = DraftedText(slot.cache, drafter, most=self._most - 1)

    def run(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Read the newest id of each slot's request: the logits (1, V) after it."""
        drafts = self._drafts(slots)
        if any(drafts):
            try:
                return self._run(slots, drafts)
            except Exception:  # noqa: BLE001 - memory may be short for the rows: what is no fault of
                for slot in slots:  # theirs comes again
                    if slot.drafts is not None:
                        slot.drafts.drop()
        return self._run(slots, [[] for _ in slots])

    def _drafts(self, slots: Sequence[Slot]) -> list[list[int]]:
        """A draft for each slot, longest matches first; often none."""
        rows, ids = len(slots), float(len(slots))
        found: dict[Slot, list[int]] = {}
        drafting = [(slot.drafts, slot) for slot in slots if slot.drafts and slot.drafts.matched]
        for text, slot in sorted(drafting, key=lambda each: -each[0].matched):
            left = min(slot.running.left, 1 + self._most - rows)
            draft = found[slot] = text.draft(left, rows, ids)
            rows, ids = rows + len(draft), ids + text.expected(draft)
        return [found.get(slot, []) for slot in slots]

    def _run(self, slots: Sequence[Slot], drafts: Sequence[list[int]]) -> list[Tensor]:
        rows: list[KVCache] = []
        ids: list[int] = []
        firsts: list[int] = []
        running: list[Running] = []
        for slot, draft in zip(slots, drafts, strict=True):
            running.append(slot.running)
            firsts.append(len(rows))
            rows += slot.drafts.rows(draft) if draft and slot.drafts else [slot.cache]
            ids += [slot.running.ids[-1], *draft]
        start = self._clock()
        logits = self._logits(ids, CacheRows(rows), dict(zip(firsts, running, strict=True)))
        self._times.took(len(rows), self._clock() - start)
        self.drafted += len(rows) - len(slots)
        return [
            slot.drafts.take(draft, logits[first : first + 1 + len(draft)])
            if draft and slot.drafts
            else logits[first : first + 1]
            for slot, draft, first in zip(slots, drafts, firsts, strict=True)
        ]

    def _logits(self, ids: list[int], rows: CacheRows, running: dict[int, Running]) -> Tensor:
        """Logits (B, V) of a pass over ids, one a row; requests by the row of their newest id."""
        newest = torch.tensor(ids)[:, None].to(self._model.device)
        counting = {row: each for row, each in running.items() if each.ticket.request.expert_counts}
        if not counting:
            return self._model.next_logits(newest, rows, None, rows.position_ids())
        logits, use = self._model.next_logits_with_experts(newest, rows, rows.position_ids())
        for row, each in counting.items():
            each.count_experts(use[:, row])
        return logits
