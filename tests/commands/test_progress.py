"""What is told of long work: on a terminal, in a log, in a pipe."""

import io
import os
import sys

import pytest
from rich.console import Console

from qmix.commands import terminal
from qmix.commands.progress import Outlook, log_lines


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def test_the_end_is_told_from_a_twentieth_on_and_counted_down():
    clock = Clock()
    outlook = Outlook(clock)
    clock.now += 4
    outlook.update(4, 100)
    assert outlook.left() is None
    clock.now += 6
    outlook.update(10, 100)
    assert outlook.left() == pytest.approx(90)
    clock.now += 30
    assert outlook.left() == pytest.approx(60)
    clock.now += 100
    assert outlook.left() == 0
    outlook.update(0, 0)
    assert outlook.text() == ""


def test_a_log_has_a_line_a_minute():
    clock, lines = Clock(), []
    show = log_lines(lines.append, clock)
    for second in range(1, 181):
        clock.now += 1
        show("layer 1", second, 600)
    assert lines == [
        " 10 %  9 min left  layer 1",
        " 20 %  8 min left  layer 1",
        " 30 %  7 min left  layer 1",
    ]


@pytest.mark.parametrize(("is_file", "lines"), [(True, 1), (False, 0)], ids=["file", "pipe"])
def test_a_file_gets_lines_and_a_pipe_nothing(is_file, lines, monkeypatch, tmp_path):
    read, write = os.pipe()
    stream = (tmp_path / "log").open("w") if is_file else os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("qmix.commands.progress._LINE_EVERY_S", 0)
    with terminal.progress() as show:
        show("layer 1", 1, 2)
    stream.close()
    text = (tmp_path / "log").read_text() if is_file else os.read(read, 100).decode()
    assert text.count("\n") == lines
    assert text.startswith(" 50 %") == is_file


def test_a_dumb_terminal_gets_lines_and_no_control(monkeypatch):
    screen = Console(
        file=io.StringIO(), force_terminal=True, color_system=None, _environ={"TERM": "dumb"}
    )
    monkeypatch.setattr(terminal, "console", lambda: screen)
    monkeypatch.setattr("qmix.commands.progress._LINE_EVERY_S", 0)
    with terminal.progress() as show:
        show("layer 1", 1, 2)
    drawn = screen.file.getvalue()
    assert "layer 1" in drawn
    assert "\x1b" not in drawn
