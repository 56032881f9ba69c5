"""What stands inside the lines of a paragraph, handed on as soon as no later text can change it.

A word is certain once a space has ended it and every mark before it has found its partner; a mark
that waits longer than `LIMIT` characters is text. Knows no lines and no columns.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from qmix.commands.markdown.cells import breakable
from qmix.commands.markdown.wrapping import Run

LIMIT = 400  # characters that may wait for the partner of a mark
_TRIES = 4  # lines of LIMIT characters that are parsed for each that is drawn, at most
_MARKS = frozenset("*_`~[]<&\\")
_STYLES = {"strong": "bold", "em": "italic", "s": "strike"}
_BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)
_CODE, _ADDRESS = "cyan", "dim"


def parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough; HTML is text, but for `<br>`."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.inline.ruler2.push("unmatched", _note_unmatched)
    return markdown


def _note_unmatched(state: StateInline) -> None:
    """Note in the environment whether a mark may still find its partner in text to come."""
    levels = [state.delimiters, *(meta["delimiters"] for meta in state.tokens_meta if meta)]
    text = "".join(token.content for token in state.tokens if token.type == "text")
    depth = 0
    for character in text:
        depth = depth + 1 if character == "[" else max(0, depth - (character == "]"))
    state.env["unmatched"] = (
        depth > 0
        or "`" in text
        or "](" in text[text.rfind(")") + 1 :]
        or any(mark.open and mark.end < 0 for level in levels for mark in level)
    )


def runs(tokens: Sequence[Token]) -> Iterator[Run]:
    """The runs of a line's tokens; an address follows its text in brackets, unless it is it."""
    styles: list[str] = []
    links: list[tuple[str, list[str]]] = []
    for token in tokens:
        name, _, ends = token.type.rpartition("_")
        if token.type in ("softbreak", "hardbreak"):
            yield Run("\n")
        elif token.type == "link_open":
            links.append((str(token.attrGet("href") or ""), []))
        elif token.type == "link_close":
            address, shown = links.pop()
            if address.removeprefix("mailto:") != "".join(shown):
                yield Run(f" ({address})", " ".join([*styles, _ADDRESS]))
        elif ends == "open":
            styles.append(_STYLES.get(name, ""))
        elif ends == "close":
            styles.pop()
        else:
            text, style = _shown(token, " ".join(filter(None, styles)))
            for _, shown in links:
                shown.append(text)
            if token.type == "text":
                yield from (Run(part, style if part != "\n" else "") for part in _lines(text))
            else:
                yield Run(text, style)


def _lines(text: str) -> Iterator[str]:
    """The text, with a newline where HTML breaks the line: the one tag that is no text."""
    for number, line in enumerate(_BREAK.split(text)):
        if number:
            yield "\n"
        if line:
            yield line


def _shown(token: Token, style: str) -> tuple[str, str]:
    if token.type == "code_inline":
        return token.content, f"{style} {_CODE}".strip()
    if token.type == "image":
        return f"{token.content} ({token.attrGet('src')})".lstrip(), style
    return token.content, style


class InlineStream:
    """The text of one paragraph as it comes."""

    def __init__(self, markdown: MarkdownIt) -> None:
        self._markdown = markdown
        self._held: list[str] = []
        self._marks = self._marks_parsed = 0  # in what is held, now and when it was parsed last
        self._characters_parsed = 0  # since something was handed on

    def feed(self, text: str) -> Iterator[Iterable[Run]]:
        """Take more text; the runs that are certain now, in groups that end with a word."""
        for character in text:
            if self._held and _ends_word(self._held[-1], character):
                group = self._certain()
                if group:
                    yield group
            self._held.append(character)
            self._marks += character in _MARKS
            if len(self._held) >= LIMIT:
                yield self.end()

    def end(self) -> Iterable[Run]:
        """All that is left."""
        text = "".join(self._held)
        tokens = self._parsed(text)[0] if self._marks else ()
        self._forget()
        return runs(tokens) if tokens else _plain(text)

    def _certain(self) -> Iterable[Run]:
        """What is held, if nothing can change it."""
        if self._marks:
            if self._marks == self._marks_parsed or self._characters_parsed > _TRIES * LIMIT:
                return ()
            tokens, unmatched = self._parsed("".join(self._held))
            self._marks_parsed = self._marks
            self._characters_parsed += len(self._held)
            if unmatched:
                return ()
            self._forget()
            return runs(tokens)
        text = "".join(self._held)
        self._forget()
        return _plain(text)

    def _parsed(self, text: str) -> tuple[list[Token], bool]:
        tokens: list[Token] = []
        environment: dict[str, bool] = {}
        self._markdown.inline.parse(text, self._markdown, environment, tokens)
        return tokens, environment["unmatched"]

    def _forget(self) -> None:
        self._held.clear()
        self._marks = self._marks_parsed = self._characters_parsed = 0


def _plain(text: str) -> Iterator[Run]:
    return (Run(part) for part in re.split(r"[ \t]*(\n)[ \t]*", text) if part)


def _ends_word(before: str, after: str) -> bool:
    if after.isspace():
        return not before.isspace() and before != "\\"  # a backslash breaks the line behind it
    return breakable(before, after) and before not in _MARKS and after not in _MARKS
