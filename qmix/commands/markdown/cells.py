"""How many columns of a terminal a text takes, and where it may be broken."""

from collections.abc import Iterator

from wcwidth import wcswidth, wcwidth

_JOINER = "\u200d"
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
_FLAGS = ("\U0001f1e6", "\U0001f1ff")
# What may not begin a line, and what may not end one, in Chinese and Japanese.
_CLOSING = frozenset(
    "、。，．：；？！）」』】〉》〕］｝ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ…～"  # noqa: RUF001
)
_OPENING = frozenset("（「『【〈《〔［｛")  # noqa: RUF001


def cells(text: str) -> int:
    """Columns that a text takes at most.

    Terminals disagree about emoji that are joined of several, flags and variation selectors:
    some draw one picture of two columns, others all parts. The wider is assumed.
    """
    if text.isascii():
        return len(text)
    return max(wcswidth(text), sum(max(0, wcwidth(character)) for character in text))


def breakable(before: str, after: str) -> bool:
    """Whether a line may end between two characters that no space separates."""
    if before.isascii() and after.isascii():
        return False
    if wcwidth(before) < 2 and wcwidth(after) < 2:
        return False
    if before == _JOINER or wcwidth(after) < 1 or _SKIN_TONES[0] <= after <= _SKIN_TONES[1]:
        return False
    if _FLAGS[0] <= before <= _FLAGS[1] and _FLAGS[0] <= after <= _FLAGS[1]:
        return False
    return before not in _OPENING and after not in _CLOSING


def parts(text: str) -> Iterator[str]:
    """A text without spaces in the parts that may stand on lines of their own."""
    if text.isascii():
        yield text
        return
    start = 0
    for end in range(1, len(text)):
        if breakable(text[end - 1], text[end]):
            yield text[start:end]
            start = end
    yield text[start:]


def folded(text: str, width: int) -> Iterator[str]:
    """A text in parts of at most `width` columns; a wider character stands alone."""
    part, taken = "", 0
    for character in text:
        more = max(0, wcwidth(character))
        if part and taken + more > width:
            yield part
            part, taken = "", 0
        part, taken = part + character, taken + more
    yield part
