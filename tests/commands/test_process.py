"""The command line as a process: streams that are closed, cannot encode, or whose reader leaves."""

import os
import subprocess
import sys

from tests.support.models import ROOT
from tests.support.process import PATIENCE, started


def command(*arguments, environment=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "qmix", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        timeout=PATIENCE,
        check=False,
        **options,
    )


def test_text_that_stdout_cannot_encode_does_not_end_a_command(small_checkpoint_nf4, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 40)
    ascii_only = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = command(
        "eval", small_checkpoint_nf4, "--data", text, environment=ascii_only, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_stdin_is_an_empty_chat(small_checkpoint_nf4):
    done = subprocess.run(
        ["sh", "-c", '"$0" -m qmix chat "$1" <&-', sys.executable, str(small_checkpoint_nf4)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode in (0, 2)
    assert b"AttributeError" not in done.stderr


def test_a_closed_stderr_changes_no_exit_code(small_checkpoint_nf4, tmp_path):
    for arguments, code in ((["quantize", "nowhere", "out"], 3), (["--version"], 0)):
        done = subprocess.run(
            ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-m", "qmix", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, arguments


def test_a_reader_that_leaves_gives_the_exit_code_of_a_broken_pipe(small_checkpoint_nf4):
    command = [
        sys.executable,
        "-m",
        "qmix",
        "generate",
        small_checkpoint_nf4,
        "a",
        "--max-new-tokens",
        "200",
    ]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) in (141, -13)  # SIGPIPE: 141 to a shell, -13 to Popen
