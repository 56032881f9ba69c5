"""The line editor with a pipe for a keyboard and a string for a screen."""

import io
import os
import sys
import threading
import time

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output

from qmix.commands.line_editing import editor as editor_module
from qmix.commands.line_editing import history as history_module
from qmix.commands.line_editing.command import Argument, Command
from qmix.commands.line_editing.completion import ChatCompleter
from qmix.commands.line_editing.editor import LineEditor
from qmix.commands.line_editing.history import HistoryFile, history_file
from qmix.commands.terminal import HeldText
from tests.support.process import PATIENCE

COMMANDS = (
    Command("/set", Argument.SETTING, "settings"),
    Command("/stats", Argument.NONE, "numbers"),
    Command("/file", Argument.PATH, "a file"),
    Command("/model", Argument.MODEL, "a model"),
)
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture
def keyboard():
    with create_pipe_input() as keys:
        yield keys


@pytest.fixture
def slowly(monkeypatch):
    """Keys come one by one, as somebody types them."""
    monkeypatch.setattr(editor_module, "_more_is_coming", lambda event: False)


def editor(keyboard, screen=None, **options):
    output = Vt100_Output(screen or io.StringIO(), lambda: Size(24, 40), enable_cpr=False)
    return LineEditor(keyboard, output, **options)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("hello\n", "hello"),
        (PASTE.format("a\r\n\tb\n/c") + "\r", "a\n\tb\n/c"),
        (PASTE.format("a\nb\n") + "more\r", "a\nb\nmore"),
        ("a\rb\r/c\rd\r", "a\nb\n/c\nd"),  # a paste that the terminal does not mark
        ("日本\x7f👨\u200d👩\u200d👧\r", "日👨\u200d👩\u200d👧"),
    ],
)
def test_what_is_typed_or_pasted_becomes_one_message(keyboard, keys, message):
    keyboard.send_text(keys)
    assert editor(keyboard).read(">>> ") == message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("a\x1b\rb\r", "a\nb"),
        ("a\\\rb\r", "a\nb"),
        ("a\\\\\r", "a\\\\"),
        ('"""a\rb\r"""\r', '"""a\nb\n"""'),
    ],
)
def test_alt_enter_a_backslash_and_a_fence_ask_for_another_line(keyboard, slowly, keys, message):
    keyboard.send_text(keys)
    assert editor(keyboard).read(">>> ") == message


def test_a_paste_of_40_lines_is_edited_as_a_block(keyboard):
    lines = [f"line {number}" for number in range(40)]
    keyboard.send_text(PASTE.format("\n".join(lines)) + "\x7f\x1b[A!\r")
    lines[38], lines[39] = "line 3!8", "line 3"
    assert editor(keyboard).read(">>> ") == "\n".join(lines)


def test_a_message_longer_than_the_screen_is_shown_once_and_whole(keyboard):
    screen = io.StringIO()
    lines = [f"line {number}" for number in range(40)]
    keyboard.send_text(PASTE.format("\n".join(lines)) + "\r")
    editor(keyboard, screen).read(">>> ")
    assert screen.getvalue().endswith(">>> " + "\n... ".join(lines) + "\n")


def test_a_default_is_edited(keyboard):
    keyboard.send_text("d\r")
    assert editor(keyboard).read(">>> ", "ol") == "old"


def test_ctrl_d_ends_and_ctrl_c_interrupts(keyboard):
    keyboard.send_text("\x04")
    with pytest.raises(EOFError):
        editor(keyboard).read(">>> ")
    keyboard.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        editor(keyboard).read(">>> ")


class Work:
    """Work that ends when a test says so."""

    def __init__(self):
        self.ended = threading.Event()

    def wait(self, seconds=None):
        return self.ended.wait(seconds)

    def text(self):
        return "half of it"


def during(reading, work, keyboard, typed):
    """Type while work goes on, which ends once the editor has taken that in."""
    keyboard.send_text(typed)
    begin = reading._watch

    def then_end(*arguments):
        begin(*arguments)
        reading._session.default_buffer.on_text_changed += lambda _: work.ended.set()

    reading._watch = then_end
    return reading.read_during(">>> ", work)


def test_a_message_is_typed_while_work_goes_on(keyboard):
    screen = io.StringIO()
    keyboard.send_text("hello\r")
    assert editor(keyboard, screen).read_during(">>> ", Work()) == "hello"
    assert "half of it" in screen.getvalue()
    assert screen.getvalue().endswith(">>> hello\n")


def test_what_was_typed_when_the_work_ended_begins_the_next_message(keyboard):
    reading = editor(keyboard)
    assert during(reading, Work(), keyboard, "hel") is None
    keyboard.send_text("lo\r")
    assert reading.read(">>> ") == "hello"
    keyboard.send_text("!\r")
    assert reading.read(">>> ") == "!"


def test_what_the_work_says_stands_above_the_message(keyboard, monkeypatch):
    stderr, work = HeldText(), Work()
    monkeypatch.setattr(sys, "stderr", stderr)

    def speak():
        if not spoken:
            spoken.append(sys.stderr.write("compiling\n"))
        elif stderr.getvalue():  # it has been passed on, and the prompt drawn again
            work.ended.set()
        return ""

    spoken = []
    work.text = speak
    assert editor(keyboard).read_during(">>> ", work) is None
    assert stderr.getvalue() == "compiling\n"


def test_ctrl_c_and_ctrl_d_are_what_they_are_while_work_goes_on(keyboard):
    for key, raised in (("\x03", KeyboardInterrupt), ("\x04", EOFError)):
        keyboard.send_text(key)
        with pytest.raises(raised):
            editor(keyboard).read_during(">>> ", Work())


@pytest.mark.parametrize("variable", ["EDITOR", "VISUAL"])
def test_ctrl_g_opens_the_users_editor(keyboard, monkeypatch, tmp_path, variable):
    program = tmp_path / "my editor"
    program.write_text('#!/bin/sh\n[ "$1" = -w ] && printf "und\\nmehr\\n" >> "$2"\n')
    program.chmod(0o700)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv(variable, f"'{program}' -w")
    keyboard.send_text("eins\x07")
    reading = editor(keyboard)
    before = reading._edited

    def then_enter(text):
        text = before(text)
        keyboard.send_text("\r")
        return text

    reading._edited = then_enter
    assert reading.read(">>> ") == "eins\nund\nmehr"


def test_an_editor_that_fails_leaves_the_message(keyboard, monkeypatch, capsys):
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "/nonexistent/editor")
    assert editor(keyboard)._edited("kept") == "kept"
    assert "does not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/s", ["/set", "/stats"]),
        ("/set t", ["temperature", "top_k"]),
        ("/set top_k ", ["0", "40"]),
        ("/set top_k 4", ["40"]),
        ("/set seed ", []),
        ("/stats x", []),
        ("/model ti", ["tiny-nf4"]),
        ("/unknown x", []),
        ("a /s", []),
        ("/s\n/s", []),
    ],
)
def test_what_tab_offers(typed, offered):
    settings = {"temperature": ("0",), "top_k": ("0", "40"), "seed": ()}
    completer = ChatCompleter(COMMANDS, settings, lambda: ["tiny-nf4"])
    found = completer.get_completions(Document(typed), None)
    assert [completion.text for completion in found] == offered


def test_tab_completes_paths_and_shows_the_help_of_commands(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    found = ChatCompleter(COMMANDS).get_completions(Document("/file no"), CompleteEvent())
    assert [completion.text for completion in found] == ["tes.txt"]
    found = ChatCompleter(COMMANDS).get_completions(Document("/st"), None)
    assert [completion.display_meta_text for completion in found] == ["numbers"]


def test_history_lasts_and_finds_what_readline_left(keyboard, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "qmix" / "chat_history"
    path.parent.mkdir(mode=0o700)
    path.write_text("first\\n stays\nsecond\n")
    path.chmod(0o644)
    keyboard.send_text(PASTE.format("two\nlines") + "\r")
    with_history = editor(keyboard, history=history_file)
    assert with_history.read(">>> ") == "two\nlines"
    assert path.stat().st_mode & 0o777 == 0o600
    again = list(HistoryFile(path).load_history_strings())
    assert again == ["two\nlines", "second", "first\\n stays"]


def test_a_long_history_is_cut_and_a_strange_one_is_not_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(history_module, "KEPT", 3)
    path = tmp_path / "history"
    path.write_text("".join(f"{number}\n" for number in range(9)))
    assert list(HistoryFile(path).load_history_strings()) == ["8", "7", "6"]
    assert path.read_text() == "6\n7\n8\n"
    path.write_text("_HiStOrY_V2_\na\\040b\n")
    assert list(HistoryFile(path).load_history_strings()) == ["a b"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "qmix").mkdir(mode=0o700)
    os.symlink(path, tmp_path / "qmix" / "chat_history")
    assert history_file() is None
    assert "not used" in capsys.readouterr().err


def test_the_editor_draws_nothing_before_it_is_read_from(keyboard):
    screen = io.StringIO()
    reading = editor(keyboard, screen)
    with reading.held():
        assert screen.getvalue() == ""


def test_messages_typed_during_a_reply_are_messages_of_their_own(keyboard):
    """A paste that the terminal marks stays one; what has no Enter yet begins the next message."""
    reading = editor(keyboard)
    with reading.held():
        keyboard.send_text("one\r" + PASTE.format("two\nlines") + " more\rth")
    assert reading.read(">>> ") == "one"
    with reading.held():
        keyboard.send_text("r")
    assert reading.read(">>> ") == "two\nlines more"
    keyboard.send_text("ee\rpasted\r")  # as an old terminal pastes
    assert reading.read(">>> ") == "three\npasted"


def test_in_a_pipeline_ctrl_c_is_a_key_and_the_others_wait(keyboard):
    reading = editor(keyboard, in_pipeline=True)

    def reply():
        with reading.held():
            keyboard.send_text("typed\x03")
            time.sleep(PATIENCE)

    with pytest.raises(KeyboardInterrupt):
        reply()
    keyboard.send_text("\r")
    assert reading.read(">>> ") == "typed"
