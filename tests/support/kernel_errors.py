"""The table of docs/accuracy.md: the largest error of the CPU kernels on each instruction set.

`python -m tests.support.kernel_errors` prints it. Each set runs in a process of its own.
"""

import json
import os
import subprocess
import sys

import torch

from qmix import kernels
from qmix.evals import markdown
from qmix.instruction_sets import TORCH, VARIABLE, supported
from tests.support.cpu_kernels import random_affine, random_int4, random_nf4, random_table, seeded

COLUMNS = {
    "float32, 1 to 1e-37": (torch.float32, (1.0, 1e-10, 1e-30, 1e-37)),
    "bfloat16, 1 to 1e-30": (torch.bfloat16, (1.0, 1e-10, 1e-30)),
    "bfloat16, 1e-34": (torch.bfloat16, (1e-34,)),
    "bfloat16, 1e-37": (torch.bfloat16, (1e-37,)),
    "float16, 1": (torch.float16, (1.0,)),
    "float16, 6e-5": (torch.float16, (6e-5,)),
}
N, K = 128, 1024


def weights():
    yield from (random_nf4(N, K), random_nf4(N, K, nested=True), random_nf4(N, K, kind="fp4"))
    yield from (random_int4(N, K, 8), random_int4(N, K, 32, zeros=True))
    yield from (random_affine(N, K, bits, 64) for bits in (2, 3, 8))
    yield random_affine(N, K, 4, 32, "6 bits of 8", biases="6 bits of 8")
    yield from (random_table(N, K), random_table(N, K, "iq4", 32, "6 bits of 8"))


def measured():
    """The largest relative error of each column, of 1 to 17 tokens."""
    largest = dict.fromkeys(COLUMNS, 0.0)
    for weight in weights():
        dense = weight.dequantize(torch.float32).double()
        for column, (dtype, sizes) in COLUMNS.items():
            for tokens in (1, 2, 3, 4, 9, 17):
                for size in sizes:
                    x = (size * torch.randn(tokens, K, generator=seeded(tokens))).to(dtype)
                    exact = x.double() @ dense.T
                    error = kernels.linear(x, weight).double() - exact
                    largest[column] = max(largest[column], float(error.norm() / exact.norm()))
    return largest


def row(name):
    environment = {**os.environ, VARIABLE: name}
    command = [sys.executable, "-m", "tests.support.kernel_errors", "--measure"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return (f"`{name}`", *(f"{error:.1e}" for error in json.loads(done.stdout).values()))


def main():
    if "--measure" in sys.argv:
        sys.stdout.write(json.dumps(measured()))
        return
    names = (TORCH, *(each.name for each in reversed(supported())))
    sys.stdout.write(markdown.table((f"`{VARIABLE}`", *COLUMNS), map(row, names)))


if __name__ == "__main__":
    main()
