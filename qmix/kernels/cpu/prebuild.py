"""`python -m qmix.kernels.cpu.prebuild`: compile what a wheel carries, before it is made.

`CXX=aarch64-linux-gnu-g++ ... prebuild aarch64` does so for another architecture. One wheel may
carry several. A file of its own, because the package has imported build.py already. Knows no torch.
"""

import argparse
import logging
import platform

from qmix.instruction_sets import ISAS
from qmix.kernels.cpu import build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the CPU kernels into the package.")
    machines = sorted({machine for isa in ISAS.values() for machine in isa.machines})
    parser.add_argument("machine", nargs="?", choices=machines, default=platform.machine())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build.prebuild(parser.parse_args().machine)
