"""Marks around control tokens that a user typed, so that they stay text when a chat is encoded.

The marks are transformers' own (`sanitize_control_tokens`): two characters for private use. Knows
no template and no tokenizer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_START, _END = "\U000f0000", "\U000f0001"
_MARKS = re.compile(f"[{_START}{_END}]")


def pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """What matches any of the tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def marked(value: Any, tokens: re.Pattern[str]) -> Any:
    """A value with marks around the tokens in its strings; marks that were in it are dropped."""
    if isinstance(value, str):
        return tokens.sub(f"{_START}\\g<0>{_END}", _MARKS.sub("", value))
    if isinstance(value, Mapping):
        return {key: marked(item, tokens) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, tokens) for item in value]
    return value


def parts(text: str, tokens: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """A text cut at its marks: (part, whether it is a token that a user typed).

    A mark that a template cut from its token only cuts the text.
    """
    found = re.split(f"{_START}({tokens.pattern}){_END}|[{_START}{_END}]", text)
    for index, part in enumerate(found):
        if part:
            yield part, index % 2 == 1
