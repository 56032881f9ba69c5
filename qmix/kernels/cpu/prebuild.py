"""`python -m qmix.kernels.cpu.prebuild`: compile what a wheel carries, before it is made.

A file of its own, because the package has imported build.py already. Knows no torch.
"""

import logging

from qmix.kernels.cpu import build

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build.prebuild()
