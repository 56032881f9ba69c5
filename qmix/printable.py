"""Text that came from outside, so that it cannot control a terminal. Standard library only.

Paths, keys, tensor names, tokens, model text and other libraries' errors pass through here before
they are printed.
"""

import unicodedata

# Characters that reorder the text around them, and the two that separate lines beside "\n".
_MARKS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"
)


def printable(text: str) -> str:
    """Running text without the characters that control a terminal.

    Removes control characters (Cc: escape, backspace, carriage return, the 8-bit C1 set) except
    newline and tab, surrogates, marks that change the direction of text, and Unicode's line and
    paragraph separators. Joiners and spaces of all kinds stay.
    """
    return "".join(c for c in text if c in "\n\t" or not _controls_terminal(c))


def escaped(text: object) -> str:
    r"""One line, in which every character that is not printable stands as its escape (`\x1b`).

    Byte strings of file names that are not UTF-8 (surrogates) are escaped too. Text that has been
    escaped stays as it is.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def escaped_lines(text: str) -> str:
    """Several lines, each escaped; the newlines stay."""
    return "\n".join(map(escaped, text.split("\n")))


def _controls_terminal(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _MARKS
