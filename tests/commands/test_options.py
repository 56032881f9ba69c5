"""What a command line writes: escapes in stop strings, and a text on stdin."""

import io
import sys

import pytest

from qmix.commands import generate
from qmix.commands.options import Sampling, unescaped


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n", "\n"),
        (r"\r\n\t", "\r\n\t"),
        (r"\\n", r"\n"),
        (r"\"\'", "\"'"),
        (r"\x41\u00e9", "Aé"),
        (r"\begin{x} C:\dir \ud800 \x4 \\", "\\begin{x} C:\\dir \\ud800 \\x4 \\"),
        ("\n", "\n"),
    ],
)
def test_escapes_of_stop_strings_are_llama_cpps(written, meant):
    assert unescaped(written) == meant
    assert Sampling(stop=[written]).parse(5).stop_strings == [meant]


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [(b"text\n", "text"), (b"text\n\n", "text\n"), (b"text\r\n", "text"), (b"text", "text"),
     (b"\xef\xbb\xbftext\n", "text"), (b"\n", "")],
)  # fmt: skip
def test_echos_newline_is_no_part_of_the_prompt(piped, prompt, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    assert generate._stdin() == prompt
