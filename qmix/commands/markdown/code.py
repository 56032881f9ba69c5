"""The lines of a block of code, coloured one by one. Knows no fences."""

from collections.abc import Iterator, Mapping

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Name, Number, Operator, String, _TokenType
from pygments.util import ClassNotFound

from qmix.commands.markdown.wrapping import Run

_NAME = 40  # characters of a language's name at most
_LINES, _CHARACTERS = 16, 1000  # that are read again
_LONG_BLOCK = 500  # lines; behind them, only what goes on is read again
_LONGEST_LINE = 1000
# Colours that stand out on a dark and on a light background.
_STYLES: Mapping[_TokenType, str] = {
    Comment: "dim italic",
    Keyword: "bold magenta",
    Name.Builtin: "cyan",
    Name.Class: "bold blue",
    Name.Decorator: "magenta",
    Name.Function: "bold blue",
    Name.Tag: "bold blue",
    Number: "cyan",
    Operator.Word: "bold magenta",
    String: "green",
}


class CodeLines:
    """Colours lines by what stands before them.

    Pygments does not say where it stands at the end of a line, so the lines before are read again:
    some of them, so that the time of a long block grows with its length only. What is read again
    begins where neither a string nor a comment goes on.
    """

    def __init__(self, language: str) -> None:
        try:
            self._lexer = get_lexer_by_name(language[:_NAME], stripnl=False, ensurenl=False)
        except ClassNotFound:
            self._lexer = None
        self._before: list[str] = []
        self._count = 0

    def line(self, text: str) -> Iterator[Run]:
        """The runs of the next line, given without its newline."""
        if self._lexer is None or len(text) > _LONGEST_LINE:
            yield Run(text)
            return
        self._count += 1
        self._before.append(text)
        skipped = sum(len(line) + 1 for line in self._before[:-1])
        kind, at, same = None, 0, Run("")
        for kind, part in self._lexer.get_tokens("\n".join(self._before) + "\n"):
            shown = part[max(0, skipped - at) :].removesuffix("\n")
            at += len(part)
            if shown and same.style == _style(kind):
                same = Run(same.text + shown, same.style)
            elif shown:
                yield same
                same = Run(shown, _style(kind))
        yield same
        inside = kind is not None and (kind in String or kind in Comment.Multiline)
        self._shorten(inside)

    def _shorten(self, inside: bool) -> None:
        """Forget lines; inside a string or a comment, only of far too many."""
        factor = 4 if inside else 1
        too_many = len(self._before) > factor * _LINES
        too_long = sum(map(len, self._before)) > factor * _CHARACTERS
        if too_many or too_long or (self._count > _LONG_BLOCK and not inside):
            self._before.clear()


def _style(kind: _TokenType) -> str:
    while kind not in _STYLES and kind.parent is not None:
        kind = kind.parent
    return _STYLES.get(kind, "")
