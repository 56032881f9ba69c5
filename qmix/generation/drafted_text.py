"""DraftedText: one text that grows id by id, and the draft of what follows it.

A pass over the newest id and the draft gives the logits after each of them; `put` hands these out
one after another, as long as the id that is chosen is the one that was drafted. Whoever runs the
pass may put other texts' rows beside these. Knows no model and no sampling.
"""

from torch import Tensor

from qmix.generation.draft_length import DraftLength
from qmix.generation.pass_times import PassTimes
from qmix.generation.prompt_lookup import PromptLookup
from qmix.nn.cache import KVCache
from qmix.nn.cache_ahead import CacheAhead


class Drafter:
    """Where drafts come from and how long they are: what a session keeps from text to text.

    Args:
        times: see DraftLength.
        most_ids: see PromptLookup.
    """

    def __init__(self, times: PassTimes | None = None, most_ids: int | None = None) -> None:
        self.lookup = PromptLookup() if most_ids is None else PromptLookup(most_ids)
        self.length = DraftLength(times)


class DraftedText:
    """A text in a cache of one row, and the draft of what follows.

    Attributes:
        drafted, accepted: ids so far.
    """

    def __init__(self, cache: KVCache, drafter: Drafter, *, most: int) -> None:
        """
        Args:
            drafter: its text is what the cache holds, and the newest id.
            most: ids of a draft.
        """
        self.drafted = self.accepted = 0
        self._cache, self._drafter = cache, drafter
        self._most = most if cache.window is None else min(most, cache.window - 1)
        self._ahead: CacheAhead | None = None
        self._draft: list[int] = []  # what has been verified and not yet chosen
        self._logits: list[Tensor] = []  # after each of them

    @property
    def matched(self) -> int:
        """How many ids of a match end at the newest one; 0: nothing can be drafted."""
        return self._drafter.lookup.matched

    @property
    def verified(self) -> bool:
        """Whether logits of a draft are left, and positions that the cache does not count yet."""
        return self._ahead is not None

    def put(self, newest: int) -> Tensor | None:
        """Go on with an id that was chosen: the logits (1, V) after it, if a pass gave them."""
        lookup, length = self._drafter.lookup, self._drafter.length
        predicted = lookup.next_id
        if predicted is not None:
            length.observe(lookup.matched, accepted=newest == predicted)
        lookup.put(newest)
        if self._draft and self._draft.pop(0) == newest:
            assert self._ahead is not None
            self._ahead.keep()
            self.accepted += 1
            return self._logits.pop(0)
        self.drop()
        return None

    def draft(self, left: int, rows: int = 1, ids: float = 1.0) -> list[int]:
        """What may follow the newest id, as long as it pays; often nothing.

        Args:
            left: ids that may still be chosen.
            rows, ids: see DraftLength.best.
        """
        lookup = self._drafter.lookup
        if not lookup.matched:
            return []
        most = min(self._most, left - 1)
        return lookup.draft(self._drafter.length.best(lookup.matched, most, rows, ids))

    def expected(self, draft: list[int]) -> float:
        """How many ids of a draft are expected to be accepted."""
        return self._drafter.length.expected(self._drafter.lookup.matched, len(draft))

    def rows(self, draft: list[int]) -> tuple[KVCache, ...]:
        """Rows for a pass over the newest id and a draft, one for each; `take` or `drop` follows.

        Once the pass has been run, the cache counts none of them.
        """
        self.drop()
        self._ahead = CacheAhead(self._cache, 1 + len(draft))
        return self._ahead.rows.rows

    def take(self, draft: list[int], logits: Tensor) -> Tensor:
        """Take the logits (S, V) of these rows: those (1, V) after the newest id."""
        assert self._ahead is not None
        self._ahead.keep()
        self.drafted += len(draft)
        self._draft, self._logits = list(draft), list(logits[1:, None])
        return logits[:1]

    def drop(self) -> None:
        """Forget the rest of a draft; the cache then is as if it had never been verified."""
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead, self._draft, self._logits = None, [], []
