"""The command line as a process: streams that are closed, cannot encode, or whose reader leaves."""

import subprocess
import sys
import types

import pytest

from qmix import __main__ as entry
from tests.support.process import PATIENCE, finished, started

COMMAND = [sys.executable, "-m", "qmix"]


def test_text_that_stdout_cannot_encode_does_not_end_a_command(small_checkpoint_nf4, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 40)
    ascii_only = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = finished(
        [*COMMAND, "eval", small_checkpoint_nf4, "--data", text], environment=ascii_only
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_stdin_is_an_empty_chat(small_checkpoint_nf4):
    done = finished(["sh", "-c", '"$@" <&-', "sh", *COMMAND, "chat", small_checkpoint_nf4])
    assert done.returncode in (0, 2)
    assert "AttributeError" not in done.stderr


def test_a_closed_stderr_changes_no_exit_code(small_checkpoint_nf4, tmp_path):
    for arguments, code in ((["quantize", "nowhere", "out"], 3), (["--version"], 0)):
        done = finished(["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, *arguments], cwd=tmp_path)
        assert done.returncode == code, arguments


def test_a_reader_that_leaves_gives_the_exit_code_of_a_broken_pipe(small_checkpoint_nf4):
    command = [*COMMAND, "generate", small_checkpoint_nf4, "a", "--max-new-tokens", "200"]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) in (141, -13)  # SIGPIPE: 141 to a shell, -13 to Popen


def test_a_server_that_leaves_ends_no_command():
    """SIGPIPE stays ignored: writing to a closed socket raises, and the error is the command's."""
    code = (
        "import socket; from qmix import cli; cli._make_streams_safe();"
        "ours, theirs = socket.socketpair(); theirs.close()\n"
        "try: ours.send(b'x')\nexcept BrokenPipeError: print('raised')"
    )
    done = finished([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (0, "raised\n")


def test_ctrl_c_while_it_is_imported_leaves_no_traceback(monkeypatch, capfd):
    class Importing(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "qmix.cli", Importing("qmix.cli"))
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capfd.readouterr() == ("", "")


def test_a_process_ends_without_taking_the_interpreter_apart():
    """Handlers run, streams are flushed and the exit code is kept; modules are not torn down."""
    code = """
import atexit, sys
from qmix.__main__ import process
class Module:
    def __del__(self):
        print("torn down")
def main():
    atexit.register(print, "handlers run")
    sys.stdout.write("text without a newline; ")
    sys.exit(7)
sys.modules["kept"] = Module()
sys.modules["qmix.cli"] = type(sys)("qmix.cli")
sys.modules["qmix.cli"].main = main
process()
"""
    done = finished([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (7, "text without a newline; handlers run\n")
