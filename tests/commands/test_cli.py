"""The command line as a user meets it: exit codes, stdout and stderr apart."""

import json
import os
import shutil
import signal
import sys
import warnings

import pytest

from qmix import __version__
from qmix.errors import CUT_REPLY
from tests.support.process import (
    PATIENCE,
    QMIX,
    Terminal,
    finished,
    python,
    qmix,
    qmix_apart,
)

COMMANDS = ("quantize", "convert", "export", "generate", "chat", "eval", "bench", "inspect")
COMMANDS += ("verify", "plan", "doctor", "demo", "trace")


def test_help_lists_the_commands_with_whole_sentences():
    result = qmix("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"  {command} ")]
        assert line.endswith("."), line
        assert not line.endswith("..."), line


def test_a_group_without_a_command_prints_its_help():
    result = qmix("trace")
    assert result.returncode == 0
    assert result.stdout == qmix("trace", "--help").stdout
    assert result.stderr == ""


@pytest.mark.parametrize("option", ["-V", "--version", "version"])
def test_version(option):
    assert qmix_apart(option).stdout == f"qmix {__version__}\n"


@pytest.mark.parametrize("names", [(), ("chat",), ("trace", "plot")])
def test_help_is_a_command_too(names):
    assert qmix("help", *names).stdout == qmix(*names, "--help").stdout


def test_help_of_no_command_is_an_error():
    assert qmix("help", "nonsense").returncode == 2


def test_called_in_this_process_it_leaves_no_trace():
    def traces():
        return warnings.formatwarning, signal.getsignal(signal.SIGPIPE), sys.argv, dict(os.environ)

    before = traces()
    assert qmix("--debug", "--version").returncode == 0
    assert traces() == before


# Runs a command, then fails if it imported what only a model needs.
WITHOUT_TORCH = """
import sys
from qmix.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "numpy", "rich.markdown"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["quantize", "--help"], 0),
        (["quantize"], 2),
        (["fly"], 2),
        (["plan", "evals/tiny", "--ctx", "x"], 2),
        (["plan", "evals/tiny", "--ram", "1G"], 0),
        (["inspect", "evals/tiny"], 0),
        (["quantize", "a", "b", "--shard-size", "three"], 2),
        (["eval", "evals/tiny", "--data", "README.md", "--max-kl", "1"], 2),
        (["bench"], 2),
        (["chat", "evals/tiny", "--ctx", "5"], 2),
        (["generate", "evals/tiny", "hi", "--temperature", "-3"], 2),
        (["generate", "evals/tiny", "hi", "--dtype", "int3"], 2),
        (["quantize", "evals/tiny", "x", "--method", "gptq", "--device", "abacus"], 2),
        (["bench", "evals/tiny", "--ram", "24Q"], 2),
        (["chat", "evals/tiny", "--backend", "abacus"], 2),
        (["trace", "record", "evals/tiny", "--out", "x"], 2),
    ],
    ids=str,
)
def test_help_usage_errors_and_headers_need_no_torch(arguments, code):
    result = python(WITHOUT_TORCH, *arguments)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fly"], 2),
        (["quantize", "only-one"], 2),
        (["quantize", "a", "b", "--method", "magic"], 2),
        (["generate", "/nowhere", "hi"], 3),
        (["chat", "/nowhere"], 3),
        (["eval", "/nowhere", "--data", "README.md"], 3),
        (["generate", "evals/tiny", "hi", "--top-p", "7"], 2),
        (["generate", "evals/tiny", "hi", "--max-new-tokens", "0"], 2),
        (["generate", "evals/tiny", "hi", "--max-new-tokens", "100000"], 2),
        (["generate", "evals/tiny", "hi", "--dtype", "int3"], 2),
        (["generate", "evals/tiny", "hi", "--device", "abacus"], 2),
        (["generate", "evals/tiny", "hi", "--device", "cuda"], 4),
        (["generate", "evals/tiny", "hi", "--seed", "-1"], 2),
        (["chat", "evals/tiny", "--ctx", "3"], 2),
        (["eval", "evals/tiny", "--data", "/nowhere.txt"], 3),
        (["eval", "evals/tiny", "--data", "README.md", "--ctx", "1"], 2),
        (["eval", "evals/tiny", "--data", "README.md", "--stride", "0"], 2),
        (["eval", "evals/tiny", "--data", "README.md", "--max-kl", "1"], 2),
        (["quantize", "evals/tiny", "evals/tiny"], 2),
        (["quantize", "evals/tiny", "evals/tiny/out"], 2),
        (["quantize", "evals/tiny", "evals"], 2),
        (["quantize", "evals/tiny", "/no/such/parent/out"], 2),
        (["quantize", "/nowhere", "/tmp/qmix-never-written"], 3),
        (["quantize", "evals/tiny", "/tmp/qmix-never-written", "--shard-size", "three"], 2),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(arguments, code):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = qmix(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if "Usage:" not in result.stderr:  # typer's own usage errors are a box
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("qmix: ")


def test_debug_shows_the_traceback():
    assert "Traceback" in qmix("--debug", "chat", "/nowhere").stderr


def test_generate_writes_the_new_text_to_stdout_and_repeats_itself(tiny):
    first = qmix_apart("generate", tiny, "Return the", "--max-new-tokens", 12)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert "tok/s" in first.stderr
    again = qmix("generate", tiny, "-", "--max-new-tokens", 12, stdin="Return the")
    assert again.stdout == first.stdout


def test_chat_works_from_a_pipe(tiny_nf4):
    result = qmix_apart("chat", tiny_nf4, "--max-new-tokens", 8, "--lines", stdin="hi\nyou\n")
    assert result.returncode == CUT_REPLY, result.stderr
    assert result.stdout.count("\n") >= 2
    assert all(line.startswith("cut short: length") for line in result.stderr.splitlines())


def test_a_reader_that_goes_away_is_no_error(tiny):
    command = f"{' '.join(QMIX)} generate {tiny} 'Return the' --max-new-tokens 40 | head -c 1"
    result = finished(["bash", "-c", command])
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_inspect_reads_headers_and_verify_reads_everything(tiny_nf4, tmp_path):
    shown = qmix("inspect", tiny_nf4)
    assert shown.returncode == 0, shown.stderr
    assert "nf4 b64 double-quant" in shown.stdout
    document = json.loads(qmix("inspect", tiny_nf4, "--json").stdout)
    assert document["parameters"] == 6_266_624
    good = qmix("verify", tiny_nf4)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("ok: ")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_nf4, damaged)
    shard = next(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    bad = qmix("verify", damaged)
    assert bad.returncode == 3
    assert shard.name in bad.stderr
    assert bad.stdout == ""


def test_eval_prints_one_json_document_with_the_agreed_names(tiny, tiny_nf4, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the number of items in a list. " * 60, encoding="utf-8")
    result = qmix("eval", tiny_nf4, "--data", text, "--reference", tiny, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document.keys() >= {
        "perplexity",
        "perplexity_stderr",
        "tokens",
        "protocol",
        "text_sha256",
    }
    assert document["reference"].keys() >= {
        "perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement",
    }  # fmt: skip
    failed = qmix("eval", tiny_nf4, "--data", text, "--reference", tiny, "--max-kl", "0")
    assert failed.returncode == 5
    assert "KL" in failed.stderr


def test_chat_in_a_terminal_two_turns_ctrl_c_stats_ctrl_d(tiny, tmp_path):
    state = {"XDG_STATE_HOME": str(tmp_path)}
    with Terminal.of("chat", tiny, "--min-p", 0, "--seed", 3, **state) as chat:
        chat.until_prompt()
        chat.send("\x1b[200~What is\n/a list?\x1b[201~\n")  # a paste is one message
        chat.until(">>> What is\r\n... /a list?\r\n")
        chat.until("tok/s")
        chat.until_prompt()
        chat.send("/set temperature 3\n")  # noise hardly ever ends by itself
        chat.until_prompt()
        chat.send("Go on\n")
        chat.until("\x1b[?2004l")  # the line editor has let go
        chat.until("Go on\r\n")
        reply = len(chat.seen)
        while len(chat.seen) < reply + 20:  # the reply is under way
            chat.read(1)
        chat.send("typed")
        chat.send("\x03")
        chat.until("stopped")
        assert "typed" not in chat.seen[: chat.at]
        chat.until_prompt()
        chat.until("typed")
        chat.send("\x15/stats\n")
        chat.until("context")
        chat.until_prompt()
        chat.send("\x03")
        chat.until("Ctrl-D")
        chat.until_prompt()
        chat.send("\x04")
        assert chat.process.wait(PATIENCE) == 0
    history = tmp_path / "qmix" / "chat_history"
    assert "Go on" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
