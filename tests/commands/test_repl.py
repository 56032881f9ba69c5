"""The chat loop on strings instead of a terminal; the real terminal is driven in test_cli."""

import pytest

from qmix.commands.chat.settings import changed
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.printable import printable
from tests.support.process import piped, run, small_session


def test_every_line_of_a_pipe_is_a_message_and_stdout_holds_the_replies_only():
    lines = ["hello", "/save x", "/undo", "/exit", '"""open', "/image", "a\\", " b"]
    session = small_session()
    text, notices = piped(session, "\n\n".join(lines) + "\r\n")
    assert [turn.user for turn in session.turns] == lines
    assert text.count("\n") >= len(lines)
    assert notices.count("cut short: length") == notices.count("\n") == len(lines)


def test_a_last_line_without_newline_counts():
    session, _, _ = run("hello")
    assert [turn.user for turn in session.turns] == ["hello"]


def test_exit_leaves_at_once():
    session, text, _ = run("/exit\nhello\n")
    assert session.turns == []
    assert text == ""


@pytest.mark.parametrize("line", ["/unknown", "/helpme", "/ set", "//", "/", "/*", "/?!"])
def test_unknown_commands_never_reach_the_model(line):
    session, text, notices = run(line + "\n")
    assert session.turns == []
    assert text == ""
    assert "no command" in notices


@pytest.mark.parametrize(
    "line", ["/tmp is full", "/usr/bin, what is it?", "/home/nobody/x.py fails", "/no/such/path"]
)
def test_a_line_that_begins_with_a_path_is_a_message(line):
    session, _, _ = run(line + "\n")
    assert session.turns[0].user == line


def test_a_wrong_command_gets_a_suggestion():
    _, _, notices = run("/udno\n/staats\n")
    assert "did you mean /undo?" in notices
    assert "did you mean /stats?" in notices


def test_a_leading_space_sends_a_slash_as_text():
    session, _, _ = run(" /etc/passwd is a file\n")
    assert session.turns[0].user == " /etc/passwd is a file"


def test_fenced_lines_are_one_message():
    session, _, _ = run('"""first\nsecond\n\nfourth"""\n"""\n/alone\n"""\n')
    assert [turn.user for turn in session.turns] == ["first\nsecond\n\nfourth", "/alone"]


def test_a_fence_that_is_never_closed_is_sent_and_said():
    session, _, notices = run('"""\nhello\nthere\n')
    assert [turn.user for turn in session.turns] == ["hello\nthere"]
    assert "not closed" in notices


def test_a_piped_message_that_does_not_fit_is_an_error():
    with pytest.raises(UsageError, match="does not fit"):
        piped(small_session(), "word " * 2000 + "\n")


def test_commands_change_and_show_what_they_name():
    session, _, notices = run(
        "/system Be brief.\nhi\n/stats\n/set temperature 0.5\n/set seed=7\n/clear\n/help\n/set\n"
    )
    assert session.system == "Be brief."
    assert session.config.do_sample
    assert session.config.temperature == 0.5
    assert session.config.seed == 7
    assert session.turns == []
    for part in ("system: Be brief.", "tok/s", "context", "forgotten", "/stats", "temperature"):
        assert part in notices


def test_system_dash_removes_the_system_prompt():
    session, _, notices = run("/system a\n/system -\n/system\n")
    assert session.system is None
    assert notices.count("(none)") == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/set temperature hot", "not a number"),
        ("/set temperature -1", "temperature"),
        ("/set top_p 2", "top_p"),
        ("/set colour 3", "no setting"),
        ("/set max_new_tokens 0", "max_new_tokens"),
    ],
)
def test_bad_settings_are_one_notice_and_change_nothing(line, named):
    session, _, notices = run(line + "\n")
    assert named in notices
    assert session.config == GenerationConfig(max_new_tokens=5, eos_token_id=2)


def test_temperature_zero_is_greedy():
    config = changed(GenerationConfig(do_sample=True), "temperature", "0")
    assert not config.do_sample
    with pytest.raises(UsageError):
        changed(config, "eos_token_id", "3")


def test_model_text_cannot_drive_the_terminal():
    hostile = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\re\x08f\u202eg\x00\n\tü[/bold]日"
    assert printable(hostile) == "a[31mb]0;titlec2Jdefg\n\tü[/bold]日"
    harmless = "fin\u00a0: \u3000 می\u200cخواهم 👨\u200d👩\u200d👧 e\u0301"
    assert printable(harmless) == harmless


def test_a_fenced_message_that_begins_with_a_slash_is_a_message():
    session, _, _ = run('"""\n/etc/passwd is a file\n"""\n')
    assert [turn.user for turn in session.turns] == ["/etc/passwd is a file"]


def test_a_fence_that_the_end_of_input_closes_is_sent_or_spoken_of():
    session, _, notices = run('"""\nhello\nworld\n')
    assert session.turns or notices
