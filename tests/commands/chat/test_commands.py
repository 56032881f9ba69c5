"""The chat's commands, typed into a chat of a small model."""

import json
import re

import pytest

from qmix.commands.chat import commands, insight_commands
from qmix.commands.chat.commands import COMMANDS, help_text
from qmix.commands.markdown.cells import cells
from tests.support.process import run, small_session, typed


@pytest.fixture(autouse=True)
def _no_clipboard(monkeypatch):
    for variable in ("WAYLAND_DISPLAY", "DISPLAY", "WSL_DISTRO_NAME", "TMUX"):
        monkeypatch.delenv(variable, raising=False)


def test_help_fits_a_screen_and_names_every_command():
    lines = help_text().splitlines()
    assert len(lines) <= 22
    assert max(map(len, lines)) <= 79
    for command in COMMANDS:
        assert command.listed == any(line.startswith(command.name) for line in lines)


def test_no_two_commands_share_a_name():
    names = [name for each in COMMANDS for name in (each.name, *each.aliases)]
    assert len(names) == len(set(names))


def test_several_lines_are_a_command_only_where_it_takes_a_text():
    assert commands.found("/undo\nthat") is None
    assert commands.is_message("/undo\nthat")
    command, argument = commands.found("/system be brief\nand kind")
    assert (command.name, argument) == ("/system", "be brief\nand kind")


def test_the_last_turn_is_undone_asked_again_and_continued():
    session, text, notices = run("Hello\n/regen\n/continue\nmore\n/undo\n/undo\n/undo\n/continue\n")
    assert session.turns == []
    assert "temperature 0 gives the same reply again" in notices
    assert "removed: more\nremoved: Hello\nthere is no turn yet" in notices
    replies = text.splitlines()
    assert replies[0] == replies[1]
    assert notices.count("cut short: length") == 4


@pytest.mark.parametrize(
    "wrong",
    [
        *("temperature nan", "temperature -1", "temperature 1e400", "seed -1", "seed 1e3"),
        *("top_k 1.5", "top_p inf", "max_new_tokens 1e400", "max_new_tokens -1", "min_p none"),
        "colour 3",
    ],
)
def test_set_refuses_what_is_no_value(wrong):
    session, _, notices = run(f"/set {wrong}\n")
    assert session.config == small_session().config
    assert notices.count("\n") == 1
    assert wrong.split()[0] in notices


def test_set_prints_the_one_value_that_changed():
    session, _, notices = run("/set max_new_tokens 2k\n/set seed=4\n/set seed none\n/set top_p\n")
    assert session.config.max_new_tokens == 2048
    lines = notices.splitlines()
    assert lines[:3] == ["max_new_tokens: 2048, was 5", "seed: 4, was none", "seed: none, was 4"]
    assert lines[3].split() == ["top_p", "1.0", "the", "default"]


def test_a_conversation_is_saved_and_goes_on_elsewhere(tmp_path):
    path = tmp_path / "chat.json"
    typed_lines = f"/system Be brief.\n/set temperature 0.5\nHello\nAnd\n/save {path}\n"
    session, _, notices = run(typed_lines)
    assert "saved 2 turns" in notices
    document = json.loads(path.read_text())
    assert [each["role"] for each in document["messages"]] == ["user", "assistant"] * 2
    other, _, notices = run(f"/load {path}\n/save {path}\n")
    assert "loaded 2 turns" in notices
    assert json.loads(path.read_text()) == document
    assert (other.system, other.config.temperature) == ("Be brief.", 0.5)
    assert [other.text_of(turn) for turn in other.turns] == list(
        map(session.text_of, session.turns)
    )
    document["model"]["name"] = "other"
    document["settings"]["temperature"] = "hot"
    path.write_text(json.dumps(document))
    kept, _, notices = run(f"Hi\n/load {path}\n/load {tmp_path}/none\n/load\n/save\n")
    assert "settings.temperature: not a number" in notices
    assert [turn.user for turn in kept.turns] == ["Hi"]
    document["settings"] = {}
    path.write_text(json.dumps(document))
    _, _, notices = run(f"/load {path}\n")
    assert "another model: other" in notices


def test_a_file_goes_along_with_the_next_message(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"one\ntwo\xff\nthree\n")
    session, _, notices = run(f"/file {path} 1-2\n/file\nwhat is this?\nand now?\n")
    name = f"{path}, lines 1 to 2"
    assert session.turns[0].user == f"{name}:\n```\none\ntwo\ufffd\n```\n\nwhat is this?"
    assert session.turns[1].user == "and now?"
    assert "1 invalid byte became U+FFFD" in notices
    assert f"with the next message: {name}" in notices
    path.write_text("word " * 2000)
    session, _, notices = run(f"/file {path}\n/file {tmp_path}\n/file -\nhi\n")
    assert "does not fit the context" in notices
    assert "a directory" in notices
    assert session.turns[0].user == "hi"


def test_looks_into_a_reply():
    session, _, notices = run("Hello\n/tokens\n/tokens ab\n/prompt\n/probs\n/experts\n/stats\n")
    first, second, *_ = session.last.prompt.ids
    assert f"{first} {second}" in notices
    assert "[INST] Hello [/INST]" in notices
    assert "message 3, reply 5" in notices
    assert notices.count(" %\n") >= 5
    chosen = session.model.causal_lm.config.num_experts_per_tok
    assert sum(session.last.expert_counts()[0]) == 5 * chosen
    for part in ("busiest: layer 0", "memory allows", "conversation  1 reply · 5 tokens"):
        assert part in notices
    _, _, notices = run("/prompt\n/probs\n/experts\n/stats\nHi\n/clear\n/stats\n")
    assert notices.count("there is no reply yet") == 5


@pytest.mark.parametrize("piece", ["▁the", "中文", "a" * 30, "日" * 9, "e\u0301", "<0x0A>", ""])
def test_a_tokens_column_is_as_wide_for_every_script(piece):
    assert cells(insight_commands._column(piece)) == insight_commands._PIECE


def test_probabilities_take_one_line_each(monkeypatch):
    _, _, notices = run("Hello\n/probs\n")
    first, *lines = notices.split("as the sampler saw them\n")[1].splitlines()
    assert len(lines) == 4
    for line in (first, *lines):
        assert re.fullmatch(r"(.{10} [ \d]{3}\.\d %  ){1,5}.{10} [ \d]{3}\.\d %", line), line


def test_counting_experts_leaves_the_conversation_as_it_was():
    session, text, _ = run("Hello\n/experts\nAnd\n")
    plain, expected, _ = run("Hello\nAnd\n")
    assert text == expected
    assert session.stats.cached_tokens == plain.stats.cached_tokens


def test_code_and_replies_are_copied(monkeypatch):
    session, copied = small_session(), []
    monkeypatch.setattr(
        "qmix.commands.chat.clipboard.copy", lambda text, screen: copied.append(text) or ["here"]
    )
    session.restore([("a", "see\n```py\nx = 1\n```\nand\n~~~\ny\n~~~\n"), ("b", "last")])
    _, notices = typed(session, "/copy\n/copy 2\n/copy code\n/copy code 2\n/copy 3\n/copy x\n")
    assert copied[0] == "last"
    assert copied[1].startswith("see")
    assert copied[2:] == ["y\n", "x = 1\n"]
    assert "there is no such reply; expected up to 2 replies" in notices
    assert "nothing to copy" in notices


def test_commands_that_a_model_does_not_have_are_refused_by_name():
    _, _, notices = run("/image cat.png\n/model other\n")
    assert "/image: Mixtral reads text only" in notices
    assert "cannot switch its model" in notices
