"""Step `tests`: the kernels against the oracle on this GPU, each test file in its own process."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_FILE_SECONDS = 300


def kernel_test_files() -> list[Path]:
    """The test files that run in Triton's interpreter or on a GPU, decode steps first."""
    paths = (ROOT / "tests" / "kernels").glob("interpreted_*.py")
    return sorted(paths, key=lambda path: ("decoding" not in path.name, path.name))


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """The numbers of passed and failed tests of each file, and pytest's output on failures."""
    if not kernel_test_files():
        yield {"file": "tests", "skipped": "no tests beside the package: not a checkout"}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for path in kernel_test_files():
        begun = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *_workers(), "--maxfail=5", str(path)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_FILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            yield {"file": path.name, "failed": f"not done after {_FILE_SECONDS} s", "output": _tail(
                text.decode() if isinstance(text, bytes) else text)}  # fmt: skip
            continue
        counts = {
            word: int(number)
            for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
        }
        result: dict[str, object] = {
            "file": path.name,
            **counts,
            "seconds": time.perf_counter() - begun,
        }
        if done.returncode:
            result["failed"] = counts.get("failed", 0) or f"exit code {done.returncode}"
            result["output"] = _tail(done.stdout + done.stderr)
        yield result


def _workers() -> list[str]:
    """Most of the time goes into compiling, which pytest-xdist, if installed, does in parallel."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]


def _tail(text: str) -> str:
    return text[-6000:]
