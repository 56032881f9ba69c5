"""`python -m qmix` is the `qmix` command."""

from qmix.cli import main

if __name__ == "__main__":
    main()
