"""Messages from plain lines, and which reader suits which streams."""

import io
import os
import pty
import termios

import pytest
from rich.console import Console

from qmix.commands.line_editing.choice import line_reader
from qmix.commands.line_editing.editor import LineEditor
from qmix.commands.line_editing.held_input import held_input
from qmix.commands.line_editing.reader import PlainLines, unfenced

ECHO = 3


def messages(text, **options):
    said = []
    reader = PlainLines(io.StringIO(text), said.append, **options)
    found = []
    while True:
        try:
            found.append(reader.read(">>> "))
        except EOFError:
            return found, said


def test_a_pipe_keeps_its_backslashes_and_a_person_continues_with_them():
    assert messages("a\\\nb\r\n")[0] == ["a\\", "b"]
    prompts = []
    assert messages("a\\\nb\nc\\\n", show=prompts.append)[0] == ["a\nb", "c\\"]
    assert prompts == [">>> ", "... ", ">>> ", "... ", ">>> "]


def test_fences_are_closed_by_the_end_of_a_line():
    found, said = messages('"""a\nx = """ b\nc"""\nd\n"""e\n', show=lambda prompt: None)
    assert [unfenced(message) for message in found] == ['a\nx = """ b\nc', "d", "e"]
    assert len(said) == 1
    assert messages('"""a\nb"""\n') == (['"""a', 'b"""'], [])


@pytest.mark.parametrize("text", ['"""', '""', '"""a', '"""a""" b', 'a"""'])
def test_what_is_not_wholly_fenced_is_left(text):
    assert unfenced(text) == text


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", encoding="utf-8") as stream:
        yield ours, stream
    os.close(ours)


def test_a_terminal_holds_what_is_typed_and_is_as_before(terminal):
    ours, stream = terminal
    before = termios.tcgetattr(stream)
    for raw in (False, True):
        with held_input(stream, raw=raw):
            held = termios.tcgetattr(stream)
            assert not held[ECHO] & termios.ECHO
            assert bool(held[ECHO] & termios.ICANON) is not raw
            assert held[ECHO] & termios.ISIG
            os.write(ours, b"typed\r")
        assert termios.tcgetattr(stream) == before
    assert os.read(stream.fileno(), 100).startswith(b"typed")


def test_which_reader_suits_the_streams(terminal, monkeypatch):
    _, keyboard = terminal
    pipe, notices = io.StringIO(), Console(file=io.StringIO())
    assert isinstance(line_reader(io.StringIO(), pipe, notices), PlainLines)
    with os.fdopen(os.dup(keyboard.fileno()), "w", encoding="utf-8") as screen:
        assert isinstance(line_reader(keyboard, screen, notices), LineEditor)
        assert isinstance(line_reader(keyboard, pipe, Console(file=screen)), LineEditor)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(line_reader(keyboard, screen, notices), PlainLines)
