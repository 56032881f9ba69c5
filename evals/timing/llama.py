"""llama.cpp beside us: another process (llama_peer.py) that tells how long a prompt took it.

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


class LlamaPeer:
    """llama.cpp in another process; without a process it measures nothing.

    Attributes:
        versions: of llama-cpp-python and llama.cpp.
        failure: why it cannot measure; empty if it can.
        folder: where its files are, KIND-1.gguf of one layer and KIND-3.gguf of three.
    """

    def __init__(
        self,
        kind: str | None,
        process: "subprocess.Popen[str] | None",
        folder: Path = Path(),
    ) -> None:
        self.kind, self._process, self.folder = kind, process, folder
        self.versions: dict[str, str] = {}
        self.failure = ""
        if process is None:
            return
        greeting = self._line()
        if greeting is None:
            self.failure = f"failed: exit code {process.wait()}"
        else:
            version, features = greeting["version"], greeting["features"]
            self.versions = {"llama-cpp-python": version, "llama.cpp": features}

    def seconds(self, tokens: int) -> tuple[float, float] | None:
        """The time of one layer and of three; None if it does not measure."""
        if self._process is None or self.failure:
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        times = self._line()
        if times is None:
            self.failure = f"failed at {tokens} tokens: exit code {self._process.wait()}"
            return None
        one, three = times
        return one, three

    def _line(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


@contextmanager
def start_llama(python: str | None, kind: str | None, config: MixtralConfig) -> Iterator[LlamaPeer]:
    """Start a process for one kind of GGUF; without an interpreter the peer measures nothing.

    Args:
        python: an interpreter that has llama-cpp-python and gguf.
        kind: Q4_0, Q4_K, Q4_K_M or IQ4_XS.

    Raises:
        UsageError: no such interpreter.
    """
    if python is None:
        yield LlamaPeer(None, None)
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
            yield LlamaPeer(kind, process, Path(folder))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
