"""Compiles the C++ sources of this package into a shared library in the user's cache directory.

The name of the file holds a hash of sources, flags and compiler, so a library is never used after
one of them has changed. The file is written beside its place and renamed: two processes at the same
time both end with a whole file. Knows no torch.
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
# No contraction: a multiplication and an addition are fused only where the source says so.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
REMEDY = "Install g++ or clang++, or name a C++17 compiler in $CXX."

_TIMEOUT = 300  # seconds; a cold compilation takes 3


def load() -> ctypes.CDLL:
    """Load the library; compile it first if the cache does not hold it.

    Raises:
        ResourceError: no compiler, or it fails.
    """
    folder = cache_directory()
    try:
        return ctypes.CDLL(str(compiled(folder)))
    except OSError as error:  # a read-only home, a full disk, a file system mounted noexec
        warnings.warn(
            f"{folder}: the compiled CPU kernels cannot be cached ({error}); this process compiles its "
            "own. Make the folder writable, or set XDG_CACHE_HOME.",
            RuntimeWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory(prefix="qmix-") as temporary:
        library = compiled(Path(temporary))
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise ResourceError(
                "the compiled CPU kernels cannot be loaded", found=error, remedy=REMEDY
            ) from None


def compiled(folder: Path) -> Path:
    """The file of the library in `folder`; it is compiled anew if it is missing or damaged.

    Raises:
        OSError: the folder cannot be written.
        ResourceError: no compiler, or it fails.
    """
    command = [*_compiler(), *FLAGS]
    version = _run([command[0], "--version"]).stdout
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*")))
    hashed = "\0".join((*command, version, *sources))
    library = folder / f"kernels-{hashlib.sha256(hashed.encode()).hexdigest()[:20]}.so"
    if _whole(library):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as temporary:
        made = Path(temporary) / library.name
        _run([*command, "-o", str(made), str(SOURCE)])
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        made.replace(library)
    return library


def _whole(path: Path) -> bool:
    """Whether the file ends in the hash of the rest: half a library would crash the process."""
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
    command = os.environ.get("CXX", "").split()
    if command:
        return command
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return [path]
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
