"""Text that cannot drive a terminal. Standard library only."""

import unicodedata

_DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """Text without characters that control a terminal; newline and tab stay.

    Control characters (Cc: escape, backspace, carriage return, the 8-bit C1 set), surrogates and
    the marks that turn the direction of text go; joiners and all kinds of spaces stay.
    """
    return "".join(c for c in text if c in "\n\t" or not _drives_terminal(c))


def _drives_terminal(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_MARKS
