"""The entry point of `qmix` and of `python -m qmix`: an early Ctrl-C ends it quietly."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    try:
        from qmix.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
