"""`qmix serve` as a process of its own, with faults that are put into it before it starts."""

import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix.evals.serving.ports import free_port
from tests.support.http_server import Caller
from tests.support.models import TINY
from tests.support.process import PATIENCE, QMIX, started

# Of a model whose steps take so many seconds, so that a reply is still on its way.
SLOW = """
import time
from qmix.models.causal_lm import MixtralForCausalLM
fast = MixtralForCausalLM.next_logits
def slow(*arguments):
    time.sleep({seconds})
    return fast(*arguments)
MixtralForCausalLM.next_logits = slow
"""
_RUN = "\nimport sys; from qmix.__main__ import process; sys.argv[0] = 'qmix'; process()"


class ServerProcess(Caller):
    """A server that answers.

    Attributes:
        process: subprocess.Popen's.
    """

    def __init__(self, port, process):
        super().__init__(port)
        self.process = process

    def ended(self):
        """Its exit code, once it has ended, and the seconds until then."""
        begun = time.monotonic()
        return self.process.wait(PATIENCE), time.monotonic() - begun


@contextmanager
def server_process(*options, port=None, fault="", model=TINY, shell="", **popen):
    """A server of the tiny model.

    Args:
        fault: code that runs before the command.
        shell: a command of bash's that comes before it, such as `ulimit -n 256;`.
    """
    port = port or free_port()
    python = [sys.executable, "-c", fault + _RUN] if fault else QMIX
    command = [*python, "serve", str(model), "--device", "cpu", "--port", str(port)]
    command += map(str, options)
    if shell:
        command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
    with started(command, **popen) as process:
        server = ServerProcess(port, process)
        _until_answering(server)
        yield server


def _until_answering(server):
    deadline = time.monotonic() + PATIENCE
    while True:
        assert server.process.poll() is None, server.process.returncode
        with suppress(OSError, IndexError):
            assert server.get("/health")[0] == 200
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def of_session(leader):
    """The processes of a session, by their numbers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found
