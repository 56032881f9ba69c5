"""Every command's help: a screen of 40 lines, examples that parse, options in panels, --json."""

import json
import re
import shlex
import shutil

import pytest

from qmix.commands.help_page import LINES, HelpPage, Panel
from tests.support import man_page
from tests.support.process import finished, qmix

WITHOUT_JSON = {"qmix trace plot": "draws a picture", "qmix serve": "answers over HTTP"}
PAGES = man_page.pages()
COMMANDS = {path: found for path, found in PAGES.items() if not hasattr(found[0], "list_commands")}


def test_the_walk_finds_nested_commands():
    assert {"qmix quantize", "qmix trace record", "qmix rm"} <= set(COMMANDS)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_a_screen_and_says_what_it_leaves_out(path, columns):
    page = HelpPage.of(*PAGES[path])
    shown, whole = page.fitted(columns - 2), page.lines(columns - 2)
    assert len(shown) <= LINES
    assert max(map(len, (*shown, *whole))) <= columns
    text = "\n".join(shown)
    assert "-h, --help" in text
    for panel in page.panels:
        for name, _ in panel.rows:
            assert re.search(rf"(?<!\S){re.escape(re.split('[ ,]', name)[0])}(?![\w-])", text), name
    assert ("--help-all shows more" in text) == (shown != whole)


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_explained_and_no_column_is_squeezed(path):
    page = HelpPage.of(*COMMANDS[path])
    for panel in page.panels:
        for name, text in panel.rows:
            assert text, name
            assert "<bool>" not in name
            assert "list[" not in name
    for line in page.lines(78):
        if line.startswith(" " * 12) and line.strip():
            assert len(line) - len(line.lstrip()) <= 40, line


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_two_examples_that_its_own_parser_takes(path):
    page = HelpPage.of(*COMMANDS[path])
    assert len(page.examples) >= 2
    for example in page.examples:
        called = example[example.index("qmix ") :].partition(" | ")[0].partition(" < ")[0]
        assert called.startswith(f"{path} ") or called == path
        command, context = COMMANDS[path]
        command.make_context(path, shlex.split(called.removeprefix(path)), parent=context.parent)


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_json_or_a_reason_why_not(path):
    command, context = COMMANDS[path]
    has = any("--json" in param.opts for param in command.get_params(context))
    assert has != (path in WITHOUT_JSON)


def test_panels_that_do_not_fit_are_left_out_from_the_end():
    rows = tuple((f"--option-{index}", "what it does") for index in range(15))
    panels = tuple(Panel(title, rows) for title in ("Options", "More", "Rare"))
    page = HelpPage("qmix do", ("Does.",), ("qmix do",), panels, closing="End.")
    shown = page.fitted(78)
    assert len(shown) <= LINES
    assert "More:" not in shown
    assert "Options:" in shown
    assert shown[-1] == "  End."
    assert "--option-14" in shown[-3]
    assert "Rare:" in page.lines(78)


def test_help_all_shows_what_help_leaves_out():
    short, whole = (qmix("quantize", option) for option in ("--help", "--help-all"))
    assert short.returncode == whole.returncode == 0
    assert "UTF-8 text like what the model will see" in whole.stdout
    assert "UTF-8 text like what the model will see" not in short.stdout
    assert "--calibration" in short.stdout


def test_alone_it_says_what_to_do_first():
    alone = qmix()
    assert (alone.returncode, alone.stderr) == (0, "")
    assert "Start here" in alone.stdout
    first = re.findall(r"^  qmix (\w+)", alone.stdout, re.MULTILINE)
    assert first == ["doctor", "plan", "quantize", "chat"]


FIELDS = {"error", "where", "expected", "found", "remedy", "exit_code"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "/nowhere", "--json"),
        ("verify", "/nowhere", "--json"),
        ("plan", "evals/tiny", "--ctx", "x", "--json"),
        ("plan", "evals/tiny", "--json", "--magic"),
        ("quantize", "evals/tiny", "evals/tiny", "--json"),
        ("quantize", "--json"),
        ("fly", "--json"),
        ("eval", "evals/tiny", "--data", "README.md", "--max-kl", "1", "--json"),
    ],
    ids=" ".join,
)
def test_under_json_an_error_is_one_object_on_stdout_with_the_same_exit_code(arguments):
    done = qmix(*arguments)
    document = json.loads(done.stdout)
    assert set(document) == FIELDS
    assert document["error"]
    assert document["exit_code"] == done.returncode
    assert done.stderr == ""
    prose = qmix(*(argument for argument in arguments if argument != "--json"))
    if prose.returncode:  # --json may itself be the error
        assert prose.returncode == done.returncode


def test_a_prompt_that_is_json_is_no_request_for_it():
    done = qmix("generate", "/nowhere", "--", "--json")
    assert done.stdout == ""
    assert done.stderr.startswith("qmix: /nowhere")


def test_ctrl_c_under_json_is_said_too(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qmix.commands.sources.described", interrupted)
    done = qmix("inspect", "evals/tiny", "--json")
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"] == "interrupted"


COMPLETIONS = {
    "a command in bash": ({"COMP_WORDS": "qmix qu", "COMP_CWORD": "1"}, "bash", "quantize"),
    "an option": ({"COMP_WORDS": "qmix quantize --sam", "COMP_CWORD": "2"}, "bash", "--samples"),
    "zsh": ({"_TYPER_COMPLETE_ARGS": "qmix trace rec"}, "zsh", "record"),
    "a value in fish": (
        {
            "_TYPER_COMPLETE_ARGS": "qmix export a b --format ",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
        "fish",
        "compressed-tensors",
    ),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_shells_complete_commands_options_and_values(case, monkeypatch):
    environment, shell, expected = COMPLETIONS[case]
    for name, value in {**environment, "_QMIX_COMPLETE": f"complete_{shell}"}.items():
        monkeypatch.setenv(name, value)
    done = qmix()
    assert expected in done.stdout
    assert "Start here" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_it_can_read(shell, monkeypatch, tmp_path):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    script = qmix("--show-completion").stdout
    assert f"complete_{shell}" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert finished([shell, "-n", tmp_path / "script"]).returncode == 0
