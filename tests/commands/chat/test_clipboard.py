"""The clipboard: which tool, what the terminal gets, and that a broken tool is no success."""

import io

import pytest

from qmix.commands.chat import clipboard


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes tools that write what they get to a file, and nothing else is on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name, code=0):
        tool = tmp_path / name
        tool.write_text(
            f'#!/bin/sh\nwhile read -r line; do echo "$line"; done > {tmp_path}/got\nexit {code}\n'
        )
        tool.chmod(0o755)
        return tmp_path / "got"

    return make


def test_the_tool_of_the_session_gets_the_text(tools):
    got = tools("wl-copy")
    tools("xclip")
    assert clipboard.copy("Grüße\n", None, {"WAYLAND_DISPLAY": "w", "DISPLAY": ":0"}) == ["wl-copy"]
    assert got.read_text() == "Grüße\n"
    assert clipboard.tool({"DISPLAY": ":0"})[0] == "xclip"
    assert clipboard.tool({}) is None


def test_a_tool_that_fails_has_copied_nothing(tools):
    tools("xsel", code=1)
    assert clipboard.copy("text", None, {"DISPLAY": ":0"}) == []


def test_a_terminal_gets_osc_52_unless_it_is_too_much():
    screen = io.StringIO()
    (way,) = clipboard.copy("Grüße", screen, {})
    assert "OSC 52" in way
    assert screen.getvalue() == "\x1b]52;c;R3LDvMOfZQ==\x07"
    assert clipboard.copy("x" * 80_000, screen, {}) == []
