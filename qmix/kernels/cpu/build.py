"""From the C++ source in this package to a shared library in the user's cache directory.

The file's name holds a hash of source, flags and compiler, so a library never outlives what it was
made of. It is written beside its place and renamed: two processes at once both end with a whole file.
Knows no torch.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from qmix.errors import ResourceError

SOURCE = Path(__file__).with_name("csrc") / "kernels.cpp"
# No contraction: a multiply and an add are fused only where the source says so, as `dequantize` has it.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
REMEDY = "Install g++ or clang++, or name a C++17 compiler in $CXX."

_TIMEOUT = 300  # seconds; a cold compilation takes 3


def load() -> ctypes.CDLL:
    """The library, compiled if the cache does not hold it.

    Raises:
        ResourceError: no compiler, or it fails.
    """
    folder = cache_directory()
    try:
        return ctypes.CDLL(str(compiled(folder)))
    except OSError as error:  # a read-only home, a full disk, a file system that runs nothing
        warnings.warn(
            f"{folder}: the compiled CPU kernels cannot be kept ({error}); this process compiled its "
            "own. Make the folder writable, or set XDG_CACHE_HOME.",
            RuntimeWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory(prefix="qmix-") as aside:
        made = compiled(Path(aside))
        try:
            return ctypes.CDLL(str(made))
        except OSError as error:
            raise ResourceError(
                "the compiled CPU kernels cannot be loaded", found=error, remedy=REMEDY
            ) from None


def compiled(folder: Path) -> Path:
    """The library's file in `folder`: as it is if it is whole, or made anew.

    Raises:
        OSError: the folder cannot be written.
        ResourceError: no compiler, or it fails.
    """
    command = [*_compiler(), *FLAGS]
    version = _run([command[0], "--version"]).stdout
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*")))
    made_of = "\0".join((*command, version, *sources))
    kept = folder / f"products-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    if _whole(kept):
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as beside:
        made = Path(beside) / kept.name
        _run([*command, "-o", str(made), str(SOURCE)])
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        made.replace(kept)
    return kept


def _whole(path: Path) -> bool:
    """Whether the file ends in the hash of the rest: using half a library would end the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/qmix`, or `~/.cache/qmix`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "qmix"


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        return chosen
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return [found]
    raise ResourceError(
        "no C++ compiler", expected=f"$CXX or {', '.join(COMPILERS)} on the PATH", remedy=REMEDY
    )


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(
            "the C++ compiler does not run", where=command[0], found=error, remedy=REMEDY
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ResourceError(
            "the C++ compiler failed",
            where=command[0],
            found=f"exit code {done.returncode}: {' / '.join(lines[:3])}",
            remedy=REMEDY,
        )
    return done
