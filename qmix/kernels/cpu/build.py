"""Compiles the C++ sources of this package into a shared library in the user's cache directory.

The name of the file holds a hash of sources, flags and compiler, so a library is never used after
one of them has changed, nor one that anybody but the user or root can have written. The file is
written beside its place and renamed: two processes at the same time both end with a whole file.

`python -m qmix.kernels.cpu.prebuild` compiles the libraries of all instruction sets of an
architecture into the package, before a wheel is made of it. What a wheel carries is loaded from
there, if nothing has changed and the system's C library is new enough. Knows no torch.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmix.errors import ResourceError, WriteError
from qmix.files import user_files
from qmix.files.file_errors import writing
from qmix.instruction_sets import InstructionSet, of_architecture

SOURCE = Path(__file__).with_name("csrc") / "kernels.cpp"
PREBUILT = Path(__file__).with_name("prebuilt")
# No contraction: a multiplication and an addition are fused only where the source says so.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
REMEDY = "Install g++ or clang++, or name a C++17 compiler in $CXX."

_LOG = logging.getLogger(__name__)
_COMPILING = ".compiling-"
_TIMEOUT = 300  # seconds; a cold compilation takes 3


def load(candidates: Sequence[InstructionSet]) -> tuple[ctypes.CDLL, str]:
    """Load the library of the first instruction set that the compiler knows, and name it.

    It is compiled first if the cache does not hold it. A cache that others can write to is not
    used: this process compiles a library of its own.

    Raises:
        ResourceError: no compiler, or it fails.
    """
    for isa in candidates[:-1]:
        try:
            return _load(isa), isa.name
        except ResourceError:
            if _is_known(isa):
                raise
    return _load(candidates[-1]), candidates[-1].name


def _load(isa: InstructionSet) -> ctypes.CDLL:
    # Without the directory there is nothing to hash the sources for.
    if PREBUILT.is_dir() and (carried := prebuilt(isa)).is_file():
        with suppress(OSError):  # made for a newer C library: this machine compiles its own
            return ctypes.CDLL(str(carried))
    folder = user_files.cache_directory()
    try:
        return ctypes.CDLL(str(compiled(folder, isa)))
    except OSError as error:  # a read-only home, a full disk, a file system mounted noexec
        found = error.found if isinstance(error, WriteError) else error
        warnings.warn(
            f"{folder}: the compiled CPU kernels cannot be cached ({found}); this process compiles "
            "its own. Make the folder yours alone and writable, or set XDG_CACHE_HOME.",
            RuntimeWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory(prefix="qmix-") as temporary:
        library = compiled(Path(temporary), isa)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise ResourceError(
                "the compiled CPU kernels cannot be loaded", found=error, remedy=REMEDY
            ) from None


def _is_known(isa: InstructionSet) -> bool:
    """Whether the compiler knows its flags. One that does not run at all is believed to.

    Compilers older than a processor do not know all that it has.
    """
    command = [*_compiler(), *isa.flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return _done(command).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return True


def prebuilt(isa: InstructionSet, machine: str | None = None) -> Path:
    """Where a wheel carries the library of an instruction set, if it carries one.

    Args:
        machine: the architecture, as platform.machine() calls it; None: this one.
    """
    return PREBUILT / (machine or platform.machine()) / _name(isa, *FLAGS, *isa.flags)


def prebuild(machine: str) -> None:
    """Compile every library of an architecture whose flags the compiler knows.

    For another architecture than this one, $CXX names a compiler that makes code for it.

    Raises:
        ResourceError: no compiler, or it fails.
    """
    for isa in filter(_is_known, of_architecture(machine)):
        library = prebuilt(isa, machine)
        library.parent.mkdir(parents=True, exist_ok=True)
        _LOG.info("compiling the 4-bit kernels for %s, %s", machine, isa.name)
        _run([*_compiler(), *FLAGS, *isa.flags, "-o", str(library), str(SOURCE)])


def _name(isa: InstructionSet, *hashed: str) -> str:
    """The name of a library: what it is for, and a hash of the sources and of what is given."""
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*")))
    digest = hashlib.sha256("\0".join((*hashed, *sources)).encode()).hexdigest()
    return f"kernels-{isa.name}-{digest[:20]}.so"


def compiled(folder: Path, isa: InstructionSet) -> Path:
    """The file of the library of an instruction set in `folder`.

    It is compiled anew if it is missing or damaged, or if others can have written it.

    Raises:
        WriteError: the folder cannot be written, or others can write to it.
        ResourceError: no compiler, or it fails.
    """
    command = [*_compiler(), *FLAGS, *isa.flags]
    library = folder / _name(isa, *command, _run([command[0], "--version"]).stdout)
    user_files.prepare(library)
    _clear(folder)
    if user_files.doubt(library) is None and _whole(library):
        return library
    _LOG.info("compiling the CPU kernels for %s, once: 10 to 20 seconds", isa.name)
    with writing(library), _workplace(folder) as workplace:
        made = workplace / library.name
        _run([*command, "-o", str(made), str(SOURCE)])
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        made.chmod(0o700)
        made.replace(library)
    return library


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A directory to compile in, locked as long as its process lives."""
    with ExitStack() as stack:
        with _locked(folder):  # or another process would clear it before it is locked
            temporary = tempfile.TemporaryDirectory(dir=folder, prefix=_COMPILING)
            workplace = Path(stack.enter_context(temporary))
            stack.enter_context(_locked(workplace))
        yield workplace


def _clear(folder: Path) -> None:
    """Remove what killed compilations left."""
    left = [path for path in folder.glob(f"{_COMPILING}*") if not path.is_symlink()]
    if not left:
        return
    with _locked(folder):
        for path in left:
            with suppress(OSError), _locked(path, wait=False):
                shutil.rmtree(path)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a directory, where the file system has locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def _whole(path: Path) -> bool:
    """Whether the file ends in the hash of the rest: half a library would crash the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


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
        done = _done(command)
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


def _done(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; what stops the wait ends the compiler's own children too."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0
    ) as process:
        try:
            out, error = process.communicate(timeout=_TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)
