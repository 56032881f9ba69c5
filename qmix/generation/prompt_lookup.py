"""PromptLookup: what followed the newest ids where they stood before, in this text or earlier ones.

Positions after the same two ids are chained, as LZ77 coders chain them, and the longest match among
the newest of a chain is followed for as long as it holds. So an id costs a few steps however long
the text is; it takes 0.2 kB. Knows no model.
"""

from itertools import takewhile

from qmix.text.common_prefix import common_prefix

_CANDIDATES = 8  # positions of a chain that are compared
_LONGEST = 32  # ids before a position that are compared
_MOST_IDS = 1 << 18
_BREAK = -1  # between two texts


class PromptLookup:
    """The ids of a session's texts, and the place where the newest ones stood before.

    Args:
        most_ids: what is older is forgotten with a new text.

    Attributes:
        matched: how many ids before that place equal the newest ones; 0: there is none. At least 2.
    """

    def __init__(self, most_ids: int = _MOST_IDS) -> None:
        self.matched = 0
        self._most_ids = most_ids
        self._source = 0  # where what may follow begins; 0: nowhere
        self._text: list[int] = []  # the newest text
        self._forget()

    def _forget(self) -> None:
        self._ids: list[int] = [_BREAK]  # of all texts
        self._latest: dict[int, int] = {}  # by two ids: the newest position after them
        self._earlier = [0, 0]  # by position: the one before it in its chain; 0: none

    @property
    def next_id(self) -> int | None:
        """The id that followed there; None if nothing did."""
        return self._ids[self._source] if self.matched else None

    def begin(self, ids: list[int]) -> None:
        """Begin a text with these ids. Of one that begins as the last text only the rest is new."""
        common = common_prefix(ids, self._text)
        start = common
        if common < len(self._text):  # another text: what it shares is context for matches
            if len(self._ids) + len(ids) > self._most_ids:
                self._forget()
                common = 0
            start = max(common - _LONGEST, 0)
            self._add(_BREAK)
            del self._text[start:]
        for index in ids[start:]:
            self._add(index)
        self._text += ids[start:]
        self._search()

    def put(self, index: int) -> None:
        """Go on with the text."""
        followed = index == self.next_id
        self._add(index)
        self._text.append(index)
        if followed and self._ids[self._source + 1] != _BREAK:
            self._source += 1
            self.matched += 1
        else:
            self._search()

    def draft(self, count: int) -> list[int]:
        """The ids that followed there, at most `count`. A text that repeats goes on repeating."""
        if not self.matched:
            return []
        period = len(self._ids) - self._source
        found = (self._ids[self._source + index % period] for index in range(count))
        return list(takewhile(lambda index: index != _BREAK, found))

    def _add(self, index: int) -> None:
        """Append an id to the texts and its position to a chain."""
        pair = self._ids[-1] << 32 ^ index
        self._ids.append(index)
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = len(self._ids)

    def _search(self) -> None:
        """Find the longest match among the newest positions of the chain."""
        self._source = self.matched = 0
        end = len(self._ids)
        place = self._earlier[end]
        for _ in range(_CANDIDATES):
            if not place:
                return
            length = self._common_before(place, end)
            if length > max(self.matched, 1) and self._ids[place] != _BREAK:
                self._source, self.matched = place, length
            place = self._earlier[place]

    def _common_before(self, one: int, other: int) -> int:
        """How many ids before two positions are equal, within a text."""
        ids = self._ids
        for length in range(_LONGEST):
            found = ids[one - 1 - length]
            if found != ids[other - 1 - length] or found == _BREAK:
                return length
        return _LONGEST
