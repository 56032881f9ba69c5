"""Replies drawn on a terminal that is a string: what is shown, and that it is shown once."""

import io
import random
import re
import time

import pytest

from qmix.commands.markdown.screen import Screen
from qmix.commands.markdown.writer import MarkdownWriter
from qmix.commands.reply_writer import RawWriter, reply_writer

SAMPLE = """\
# Head *it*

Text with **bold**, `code`, snake_case, 2 * 3, [a](http://b/c) and **two
lines**. A\\
break.
- one
  1. two

     para
- three
> quote
> - in it

```python
'''doc

string''' # no comment
```
| A | B |
|---|--:|
| 日本 | 1 |
| \U0001f468\u200d\U0001f469\u200d\U0001f467 x | **22** |

|x| text | more
***
~~~
open
"""


class Terminal(io.StringIO):
    """A string that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def drawn(text, width=40, step=7):
    terminal = Terminal()
    writer = MarkdownWriter(Screen(terminal, width))
    for start in range(0, len(text), step):
        writer.write(text[start : start + step])
    writer.close()
    return terminal.getvalue()


def shown(text, width=40):
    """What is drawn, without styles."""
    return re.sub(r"\x1b\[[\d;]*m", "", drawn(text, width))


@pytest.mark.parametrize("width", [12, 40, 120])
def test_the_drawing_is_the_same_however_the_reply_comes(width):
    whole = drawn(SAMPLE, width, len(SAMPLE))
    for step in (1, 2, 3, 5, 11):
        assert drawn(SAMPLE, width, step) == whole


def test_random_markdown_is_drawn_the_same_however_it_comes_and_loses_no_word():
    random_ = random.Random(5)
    parts = [
        "**",
        "*",
        "_",
        "`",
        "[",
        "](",
        ")",
        "word",
        "日本",
        " ",
        " ",
        "\n",
        "\n\n",
        "- ",
        "> ",
    ]
    parts += [
        "<br>",
        "\t",
        "1. ",
        "```",
        "# ",
        "|",
        "~~",
        "\\",
        "&amp;",
        "    ",
        "\U0001f469\u200d",
    ]
    for _ in range(40):
        text = "".join(random_.choices(parts, k=60))
        whole = drawn(text, 30, len(text))
        assert drawn(text, 30, random_.randint(1, 9)) == whole, text
        assert whole.count("word") == text.count("word"), text
        text = "".join(random_.choices([*parts, "|", "\n|-|-|\n"], k=60))
        assert drawn(text, 30, random_.randint(1, 9)) == drawn(text, 30, len(text)), text


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a **b c** d", "a b c d"),
        ("it's 2 * 3 = 6 and snake_case_name", "it's 2 * 3 = 6 and snake_case_name"),
        ("[INST] list[int] [bold]x[/bold]", "[INST] list[int] [bold]x[/bold]"),
        ("see [the page](http://x.y/z)", "see the page (http://x.y/z)"),
        ("<http://x.y> [http://x.y](http://x.y)", "http://x.y http://x.y"),
        ("a\nb\n\n\n\nc", "a\nb\n\nc"),
        ("- a\n  - b\n\n  c\n1. d", "• a\n  • b\n\n  c\n1. d"),
        ("1. a\n  - b\n   c", "1. a\n   • b\n     c"),
        ("* * *", "─" * 39),
        ("> a\nb\n>\n> c\n\nd", "│ a\n│ b\n│\n│ c\n\nd"),
        ("In\n1984. it was", "In\n1984. it was"),
        ("**never closed", "**never closed"),
        ("| a |\nno table", "| a |\nno table"),
        ("```\n  a\tb\n", "─" * 39 + "\n  a\tb\n" + "─" * 39),
        ("- x\n  ```c\n  int y;\n  ```\n", None),
        ("<b>html</b> &lt; \\*", "<b>html</b> < *"),
        ("", ""),
        ("\tcode  *x*\n\n    more\n", "code  *x*\n\nmore"),
        ("a<br>b\tc", "a\nb c"),
        ("| a |\n|---|\n| long<br/>b |\n", "a\n────\nlong\nb"),
        ("1. a:\n```\nx\n```\n2. b", f"1. a:\n{'─' * 39}\nx\n{'─' * 39}\n2. b"),
    ],
)
def test_what_is_shown(text, lines):
    if lines is None:
        lines = f"• x\n  ── c {'─' * 32}\n  int y;\n  {'─' * 37}"
    assert shown(text) == lines + "\n"


def test_words_wrap_and_hang():
    assert shown("- " + "word " * 5 + "\n\n" + "日本語の文。" * 3, 13) == (
        "• word word\n  word word\n  word\n\n日本語の文。\n日本語の文。\n日本語の文。\n"
    )


def test_a_table_keeps_its_columns_whatever_its_characters():
    table = "| a | b |\n|:--|--:|\n| 日本 | 1 |\n| e\u0301 | 22 |\n| long cell here | 3 |\n"
    lines = shown(table, 16).split("\n")
    assert lines[0].index("│") == lines[1].index("┼")
    assert "\x1b[" in lines[2]  # the bar is put on its column
    assert all("│" in line for line in lines[2:-1])


def test_styles_and_code_are_coloured_and_colours_can_be_off(monkeypatch):
    text = "**b** *i* `c`\n```python\ndef f(): 'x'\n```\n"
    assert "\x1b[1mb\x1b[0m" in drawn(text)
    assert "\x1b[32m'x'" in drawn(text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1mb\x1b[0m" in drawn(text)
    assert not re.search(r"\x1b\[[\d;]*3\dm", drawn(text))


def test_complete_words_are_shown_before_their_line_is():
    terminal = Terminal()
    writer = MarkdownWriter(Screen(terminal, 40))
    writer.write("One two **th")
    assert terminal.getvalue() == "One two"
    writer.write("ree** four")
    assert terminal.getvalue() == "One two \x1b[1mthree\x1b[0m"


def test_a_reply_wraps_at_the_width_of_the_moment():
    class Narrowing(Screen):
        width = 40

    terminal = Terminal()
    screen = Narrowing(terminal)
    writer = MarkdownWriter(screen)
    writer.write("word " * 10)
    Narrowing.width = 20
    writer.write("word " * 10)
    writer.close()
    lines = terminal.getvalue().split("\n")
    assert max(map(len, lines[2:])) <= 20 < len(lines[0])


def test_a_reply_that_is_cut_in_a_table_or_in_code_ends_soundly():
    assert shown("| a | b |\n|---|---|\n| 1 |").endswith("1 │ \n")
    assert shown("```python\nx = '''a").endswith("a\n" + "─" * 39 + "\n")


def test_controls_never_reach_the_terminal():
    hostile = "a\x1b[31mb\x1b]0;t\x07 &#27;[2J &#8238; \u202e`\x9b2J` [x](\x1b[H)\n```\x1b[1m\n\x1b[2J\r\n"
    text = drawn(hostile + "| \x1b[3J | b |\n|-|-|\n| &#x202e; | \x1b |\n" + "\x1b" * 5000)
    controls = re.sub(r"\x1b\[[\d;]*[mG]", "", text)
    assert not set(controls) & set("\x1b\x07\x9b\r\u202e")


def hostile(size):
    """Replies of about `size` characters that could cost more than their length."""
    table = "|a" * 500 + "|\n" + "|-" * 500 + "|\n"
    return {
        "quotes": "> " * (size // 2),
        "lists": "- " * (size // 2),
        "wide table": table + ("|b" * 500 + "|\n") * (size // 1000),
        "empty rows": "|a|b|\n|-|-|\n" + "|\n" * (size // 2),
        "fence": "```python\n" + "x = '''\n" * (size // 8),
        "line": "a" * size,
        "code line": "```c\n" + "a" * size,
        "stars": "*a **b " * (size // 7),
        "brackets": "![[](" * (size // 5),
        "ticks": "`a ``b " * (size // 7),
        "escapes": "\x1b[1m\\&#27;" * (size // 10),
        "spaces": " " * size + "a",
        "combining": "e" + "\u0301" * size,
    }


@pytest.mark.parametrize("name", hostile(1))
def test_a_hostile_reply_takes_linear_time(name):
    def seconds(size):
        begun = time.process_time()
        drawn(hostile(size)[name], 80, 50)
        return time.process_time() - begun

    drawn(hostile(100)[name], 80, 50)
    small, large = (min(seconds(size) for _ in range(2)) for size in (1200, 4800))
    assert large < 12 * small + 0.1


def test_pipes_plain_and_dumb_terminals_get_the_reply_as_it_is(monkeypatch):
    assert isinstance(reply_writer(io.StringIO()), RawWriter)
    assert isinstance(reply_writer(Terminal(), plain=True), RawWriter)
    assert isinstance(reply_writer(Terminal()), MarkdownWriter)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(reply_writer(Terminal()), RawWriter)
    stream = io.StringIO()
    writer = RawWriter(stream)
    for piece in ("# a *b*\n", "| c", "\x1b"):
        writer.write(piece)
    writer.close()
    assert stream.getvalue() == "# a *b*\n| c\n"


def test_lines_are_drawn_in_ascii_where_the_encoding_has_no_others():
    terminal = Terminal()
    terminal.encoding = "latin-1"
    writer = MarkdownWriter(Screen(terminal, 20))
    writer.write("- a\n***\n| a | b |\n|-|-|\n| 1 | 2 |\n")
    writer.close()
    assert terminal.getvalue().isascii()
