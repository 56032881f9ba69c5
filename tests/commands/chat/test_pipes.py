"""A message from the command line, from a pipe, or from both; JSON, and exit codes."""

import itertools
import json

import pytest

from qmix.errors import CTRL_C, CUT_REPLY
from qmix.generation.loop import stream
from tests.support.process import qmix

GREEDY = ("--temperature", 0, "--device", "cpu", "--ctx", "200")


def asked(folder, *arguments, stdin=None):
    """The document of one reply, and the exit code."""
    done = qmix("chat", folder, *GREEDY, "--json", *arguments, stdin=stdin)
    assert done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout), done


def test_a_pipe_is_one_message_behind_the_text(tiny_nf4):
    short = ("--max-new-tokens", 3)
    alone, done = asked(tiny_nf4, *short, stdin="/help\n\nsecond line\n")
    assert done.returncode == CUT_REPLY
    assert (alone["finish"], alone["cut"], alone["new_tokens"]) == ("length", True, 3)
    text, _ = asked(tiny_nf4, "review this", *short)
    both, _ = asked(tiny_nf4, "review this", *short, stdin="/help\n\nsecond line\n")
    assert both["prompt_tokens"] > max(text["prompt_tokens"], alone["prompt_tokens"])
    assert both["model"] == tiny_nf4.name
    assert {"first_token_s", "elapsed_s", "tokens_per_s", "context_limit"} <= both.keys()


def test_exit_codes_say_whether_a_reply_is_whole(tiny_nf4):
    whole, done = asked(tiny_nf4, "Hi", "--stop", "e")
    assert (whole["finish"], done.returncode) == ("stop_string", 0)
    assert "e" not in whole["text"]
    full, done = asked(tiny_nf4, "Hi", "--ctx", 20, "--max-new-tokens", 4000)
    assert (full["finish"], done.returncode) == ("context", CUT_REPLY)
    raw = qmix("chat", tiny_nf4, *GREEDY, "Hi", "--max-new-tokens", 2)
    assert (raw.returncode, raw.stderr.split(" · ")[0]) == (CUT_REPLY, "cut short: length")
    quiet = qmix("chat", tiny_nf4, *GREEDY, "Hi", "--max-new-tokens", 2, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (CUT_REPLY, raw.stdout, "")


def test_ctrl_c_in_a_pipe_gives_what_there_is(tiny_nf4, monkeypatch):
    def interrupted(*arguments):
        yield from itertools.islice(stream(*arguments), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("qmix.commands.chat.local_model.stream", interrupted)
    document, done = asked(tiny_nf4, "Hi")
    assert (document["finish"], document["new_tokens"]) == ("stopped", 2)
    assert done.returncode == CTRL_C


def test_lines_are_messages_of_one_conversation(tiny_nf4):
    short = ("--max-new-tokens", 2, "--lines", "--json")
    done = qmix("chat", tiny_nf4, *GREEDY, *short, stdin="Hi\n\n/undo\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert second["cached_tokens"] > first["prompt_tokens"]
    assert (done.returncode, done.stderr) == (CUT_REPLY, "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ((), "", "there is no message"),
        ((), "\n \n", "there is no message"),
        (("Hi", "--lines"), "a", "--lines takes its messages from stdin"),
        (("Hi", "--ctx", "7"), None, "--ctx: out of range; expected 16 to 1024"),
        (("Hi", "--ctx", "2k"), None, "--ctx: out of range"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(
    tiny_nf4, monkeypatch, arguments, stdin, said
):
    monkeypatch.setattr("qmix.models.auto.load", None)
    done = qmix("chat", tiny_nf4, *arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_continuation_says_how_it_ended_and_only_a_reply_is_cut(tiny_nf4):
    two = ("--max-new-tokens", 2, "--device", "cpu")
    done = qmix("generate", tiny_nf4, "Return", *two)
    assert done.returncode == 0
    assert "ended by length" in done.stderr
    document = json.loads(qmix("generate", tiny_nf4, "Return", *two, "--json").stdout)
    assert (document["finish"], document["new_tokens"]) == ("length", 2)
    assert document["text"] == done.stdout.removesuffix("\n")
    assert qmix("generate", tiny_nf4, "Return", *two, "--chat").returncode == CUT_REPLY
