"""The environment of a test session: a home of its own, one thread a process, default signals.

Children inherit it. Imports no torch, whose threads are counted when it is loaded.
"""

import fcntl
import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

HOME_PREFIX = "qmix-home-"
# What a user may have set, and what no test may see.
PRIVATE = (
    *(
        "QMIX_DEBUG",
        "QMIX_BACKEND",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_STATE_HOME",
    ),
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"),
    *(
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONWARNINGS",
        "PYTHONOPTIMIZE",
        "PYTHONSTARTUP",
        "PYTHONINSPECT",
        "INPUTRC",
    ),
    *("CXX", "CXXFLAGS", "TRITON_CACHE_DIR", "TRITON_HOME", "HF_HOME", "MPLBACKEND"),
)
FIXED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # tests that ask for threads do not spin beside other workers
    "HF_HUB_OFFLINE": "1",
    "QMIX_TUNE": "0",  # a test of something else does not search
    "TERM": "xterm",
}


def enter() -> Path:
    """Set environment and signals of this process; return its home, which the caller removes."""
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
    for name in PRIVATE:
        os.environ.pop(name, None)
    os.environ.update(FIXED, HOME=str(home))
    default_signals()
    return home


def entered() -> bool:
    """Whether this process was started by one whose environment is a test's."""
    return Path(os.environ.get("HOME", "")).name.startswith(HOME_PREFIX)


@contextmanager
def locked(folder: Path):
    """One process at a time."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_compiled(kept: Path, load) -> None:
    """Call `load` with the compiled kernels that `kept` holds in the home's cache, then keep them.

    Of several workers that start together the first compiles, and the others find what it made.
    """
    cache = Path.home() / ".cache" / "qmix"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(kept):
        for library in kept.glob("*.so"):
            if not (cache / library.name).exists():  # collecting may have loaded it already
                shutil.copy(library, cache)
        load()
        for library in cache.glob("*.so"):
            if not (kept / library.name).exists():
                shutil.copy(library, kept)


def default_signals() -> None:
    """Take Ctrl-C and be ended by SIGTERM as a foreground job is, and so do children.

    A shell starts a background job with SIGINT ignored, and what is ignored children inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGALRM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
