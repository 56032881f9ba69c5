"""Text that cannot control a terminal. Standard library only."""

import unicodedata

_DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """The text without characters that control a terminal.

    Removes control characters (Cc: escape, backspace, carriage return, the 8-bit C1 set) except
    newline and tab, surrogates, and the marks that change the direction of text. Joiners and spaces
    of all kinds stay.
    """
    return "".join(c for c in text if c in "\n\t" or not _controls_terminal(c))


def _controls_terminal(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_MARKS
