"""What came from outside never reaches the terminal as it is, whichever command prints it."""

import ast
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qmix import strict_json
from qmix.commands import terminal
from qmix.errors import ResourceError
from qmix.printable import escaped, printable
from tests.support import raw_mistral
from tests.support.models import ROOT, quantized, small_model, write_dense
from tests.support.process import finished, qmix

# Colour, title, the clipboard (OSC 52), 8-bit CSI, bidi marks, separators, and a carriage return.
HOSTILE = "a\x1b[31mb\x1b]0;OWNED\x07c\x1b]52;c;aGk=\x07d\x9b2Je\u202ef\u200f\u061c\u2028g\rh\x7f"
BYTES = os.fsdecode(b"i\xff\x1bj")  # not UTF-8
RAW = set(HOSTILE) - set("ab[31m]0;OWNEDcdaGk=52Jefgh") | {"\udcff", "\0"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder whose every name is hostile: dense and 4-bit checkpoints, and Mistral's own."""
    folder = tmp_path_factory.mktemp("terminal") / HOSTILE
    quantized(write_dense(folder / "dense", num_hidden_layers=1), folder / HOSTILE)
    model = small_model(vocab_size=2048, num_hidden_layers=1).to(torch.bfloat16)
    raw_mistral.write(folder / "raw", model, layout="safetensors")
    params = strict_json.read(folder / "raw" / "params.json")
    strict_json.write(folder / "raw" / "params.json", {**params, HOSTILE: 1, "\0": 2})
    (folder / f"text{HOSTILE}").write_text("hello world " * 40)
    return folder


def command_lines(folder):
    packed, text = folder / HOSTILE, folder / f"text{HOSTILE}"
    return {
        "quantize": ("quantize", folder / "dense", folder / f"q{HOSTILE}", "--json"),
        "rtn": ("quantize", folder / "dense", folder / f"r{HOSTILE}", "--method", "rtn"),
        "convert": ("convert", folder / "raw", folder / f"c{HOSTILE}"),
        "export": ("export", packed, folder / f"e{HOSTILE}", "--format", "gptq"),
        "inspect": ("inspect", packed),
        "verify": ("verify", packed),
        "plan": ("plan", packed),
        "plan --json": ("plan", packed, "--json"),
        "bench": ("bench", packed, "-p", "4", "-n", "2", "-r", "1"),
        "eval": ("eval", packed, "--data", text),
        "generate": ("generate", packed, HOSTILE, "--max-new-tokens", "3"),
        "trace record": ("trace", "record", packed, "hi", "--out", folder / f"t{HOSTILE}"),
        "trace replay": ("trace", "replay", folder / f"x{HOSTILE}", "--slots", "1"),
        "no such directory": ("chat", folder / f"no{HOSTILE}"),
        "no such bytes": ("inspect", folder / BYTES),
        "NUL": ("inspect", f"{folder}/\0"),
        "no such option": ("plan", f"--{HOSTILE}"),
        "no such command": (HOSTILE,),
        "no such choice": ("quantize", "a", "b", "--method", HOSTILE),
        "no such card": ("plan", packed, "--card", HOSTILE),
        "no such number": ("plan", packed, "--batch", HOSTILE),
        "too many arguments": ("plan", packed, HOSTILE),
    }


@pytest.mark.parametrize("name", command_lines(Path()))
def test_no_command_prints_what_came_from_outside_as_it_is(hostile, name):
    done = qmix(*command_lines(hostile)[name])
    assert done.returncode in (0, 2, 3)
    for stream in (done.stdout, done.stderr):
        assert not RAW & set(stream), ascii(stream)
        assert "Traceback" not in stream
        assert "(--debug shows where)" not in stream


def test_a_traceback_is_escaped_too(hostile):
    done = qmix("--debug", "chat", hostile / f"no{HOSTILE}")
    assert "Traceback" in done.stderr
    assert done.returncode == 3
    assert not RAW & set(done.stderr)


def test_a_damaged_header_of_every_kind_is_said_escaped(hostile, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(hostile / "dense", folder)
    for entry in ({HOSTILE: 1, "hidden_act": HOSTILE}, {"torch_dtype": HOSTILE}):
        document = {**json.loads((folder / "config.json").read_text()), **entry}
        (folder / "config.json").write_text(json.dumps(document))
        done = qmix("inspect", folder)
        assert done.returncode == 3
        assert not RAW & set(done.stderr)


@pytest.mark.parametrize("text", [HOSTILE, BYTES, "\0", "a\nb"])
def test_notices_progress_tables_warnings_and_json_are_escaped(capsys, text, monkeypatch):
    terminal.notice(text)
    terminal.message(text)
    terminal.table(["what"], [[f"{text}[bold]"]])
    terminal.print_error(OSError(text))
    terminal.print_error(OSError(text), with_traceback=True)
    terminal.print_json({text: text})
    terminal.print_result(text.replace("\n", ""), {}, as_json=False)
    plain = terminal.format_warning(text, UserWarning, text, 1)
    assert plain == f"warning: {escaped(text)}\n"
    monkeypatch.setenv("QMIX_DEBUG", "1")
    sys.stderr.write(terminal.format_warning(text, UserWarning, text, 1))
    shown = capsys.readouterr()
    assert not RAW & set(shown.out), ascii(shown.out)
    last = shown.err.splitlines()[-1]
    assert not RAW & set(last)
    assert last.startswith(f"{escaped(text)}:1: UserWarning")
    assert "[bold]" in shown.err.replace("\n", "") or text == HOSTILE  # its cell is wrapped


def test_a_progress_bar_on_a_terminal_is_escaped(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=300)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    with terminal.progress() as show:
        show(f"{HOSTILE}[bold]", 1, 2)
    drawn = screen.file.getvalue()
    assert "OWNED" in drawn
    assert "\x1b]" not in drawn
    assert "\u202e" not in drawn


@pytest.mark.parametrize("text", [HOSTILE, BYTES, "\0"])
def test_model_text_and_escapes_hold_nothing_that_controls(text):
    assert not RAW & set(printable(text))
    assert not RAW & set(escaped(text))
    assert escaped(escaped(text)) == escaped(text)


def test_only_the_terminal_writes_to_the_streams():
    for path in (ROOT / "cli.py", *(ROOT / "qmix" / "commands").rglob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "print", path
                written = ("stdout.write", "stderr.write", "text.write", "echo", "console().print")
                assert not called.endswith((*written, "notices.print")), (path, called)


# Streams that cannot be written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "evals/tiny"]])
def test_a_full_stdout_is_one_clear_error(arguments):
    with Path("/dev/full").open("w") as full:
        done = finished([sys.executable, "-m", "qmix", *arguments], stdout=full)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("qmix: stdout: cannot be written")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_screen_is_no_error_and_a_full_reply_is():
    with Path("/dev/full").open("w") as full:
        terminal.show_lines("a", Console(file=full))
        with pytest.raises(ResourceError, match="stdout: cannot be written"):
            terminal.write("a", full)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, "stopped · 12 tokens · 4.0 tok/s"),
        (19, "stopped · 12 tokens"),
        (6, "stopp…"),
        (200, "stopped · 12 tokens · 4.0 tok/s · context 日本"),
    ],
)
def test_a_status_never_takes_a_second_line_of_a_terminal(width, shown):
    text = "stopped · 12 tokens · 4.0 tok/s · context 日本"
    screen = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)
    terminal.show_status(text, screen)
    assert screen.file.getvalue() == shown + "\n"
    log = Console(file=io.StringIO(), width=width, color_system=None)
    terminal.show_status(text, log)
    assert log.file.getvalue() == text + "\n"


def test_names_of_any_script_have_the_same_columns():
    from rich.cells import cell_len

    names = ["mixtral-nf4", "模型-四位", "نموذج", "e\u0301te\u0301", "\x1b[31mred"]
    for options in ({}, {"width": 8}, {"width": 20, "right": True}):
        found = terminal.cells(names, **options)
        assert {cell_len(each) for each in found} == {options.get("width", cell_len(found[0]))}
        assert "\x1b" not in "".join(found)
    assert terminal.cells(["模型", "abc"], right=True) == ["模型", " abc"]
    assert terminal.cells(["模型"], 3) == ["模 "]
    assert terminal.cells([]) == []


@pytest.mark.parametrize("width", range(20, 60))
def test_a_line_of_parts_breaks_between_parts(width):
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    text = "reply         128 tokens · 61.1 tok/s · first token 0.04 s · context 300/300 (100 %)"
    terminal.show_lines(text, screen)
    lines = screen.file.getvalue().splitlines()
    assert not any(line.strip().startswith("·") or line.rstrip().endswith("·") for line in lines)
    assert " ".join(" ".join(lines).split()).replace("· ", "") == (
        " ".join(text.split()).replace("· ", "")
    )
