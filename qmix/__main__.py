"""The entry points of `qmix` and of `python -m qmix`: an early Ctrl-C ends it quietly, and a late
end is quick.
"""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    try:
        from qmix.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def process() -> NoReturn:
    """Run the command line as a process of its own, which ends as soon as its work has.

    The interpreter would take torch apart, module by module: 0.7 s of the processor, and 5 s after
    a SIGTERM on a busy machine.
    """
    code: object = 1  # of an error that nobody caught

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    atexit.register(leave)  # the first one registered is the last one called
    try:
        main()
    except SystemExit as end:
        code = end.code
        raise


if __name__ == "__main__":
    process()
