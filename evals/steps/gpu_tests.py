"""The kernels against the oracle on this GPU, each test file in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qmix.evals.steps.setting import NotHereError, Setting

ROOT = Path(__file__).resolve().parents[2]
_FILE_SECONDS = 60
_REPORT = ("-q", "--tb=short", "-p", "no:cacheprovider", "--maxfail=5")


def kernel_test_files() -> list[Path]:
    """The test files that run in Triton's interpreter or on a GPU, decode steps first."""
    paths = (ROOT / "tests" / "kernels").glob("interpreted_*.py")
    return sorted(paths, key=lambda path: ("decoding" not in path.name, path.name))


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """The numbers of passed and failed tests of each file, and pytest's output on failures.

    A rehearsal collects those of the first file, and runs none.

    Raises:
        NotHereError: there are no tests, or no pytest.
    """
    setting.release()
    if not kernel_test_files():
        raise NotHereError("no tests beside the package: not a checkout")
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    if setting.is_rehearsal:
        yield _run(kernel_test_files()[0], ("--collect-only",))
        return
    for path in kernel_test_files():
        yield _run(path, _workers())


def _run(path: Path, options: tuple[str, ...]) -> dict[str, object]:
    """What pytest makes of one file."""
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_REPORT, *options, str(path)],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        said = text.decode() if isinstance(text, bytes) else text
        failed = f"not done after {_FILE_SECONDS} s"
        return {"file": path.name, "failed": failed, "output": said[-6000:]}
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    seconds = time.perf_counter() - begun
    result: dict[str, object] = {"file": path.name, **counts, "seconds": seconds}
    if done.returncode not in (0, 5):  # 5: nothing to run, as where a file skips itself
        result["failed"] = counts.get("failed", 0) or f"exit code {done.returncode}"
        result["output"] = (done.stdout + done.stderr)[-6000:]
    return result


def _workers() -> tuple[str, ...]:
    """Most of the time goes into compiling, which pytest-xdist, if installed, does in parallel."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))))
