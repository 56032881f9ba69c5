"""llama.cpp beside us: a process of its own (llama_peer.py) that answers how long a prompt took it.

Knows nothing of our layers.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qmix.config import MixtralConfig
from qmix.errors import UsageError


class Llama:
    """llama.cpp in another process; without one it answers nothing."""

    def __init__(self, kind: str | None, process: "subprocess.Popen[str] | None") -> None:
        self.kind, self._process = kind, process
        self.versions: dict[str, str] = {}
        self.failure = ""
        if process is None:
            return
        said = self._line()
        if said is None:
            self.failure = f"failed: exit code {process.wait()}"
        else:
            self.versions = {"llama-cpp-python": said["version"], "llama.cpp": said["features"]}

    def seconds(self, count: int) -> tuple[float, float] | None:
        """Of one and of three layers."""
        if self._process is None or self.failure:
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        one, three = self._line()
        return one, three

    def _line(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


@contextmanager
def llama(python: str | None, kind: str | None, config: MixtralConfig) -> Iterator[Llama]:
    """A process for one kind of GGUF; python None gives one that answers nothing.

    Raises:
        UsageError: no such interpreter.
    """
    if python is None:
        yield Llama(None, None)
        return
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.num_local_experts,
        config.num_attention_heads,
        config.num_key_value_heads,
        torch.get_num_threads(),
    )
    script = str(Path(__file__).with_name("llama_peer.py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [python, script, folder, str(kind), *map(str, sizes)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UsageError("no such interpreter", where="--llama", found=error) from None
        try:
            yield Llama(kind, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
