"""The kernels for Arm, emulated, against float64; skipped where there is no cross compiler.

On Debian: apt install g++-aarch64-linux-gnu qemu-user
"""

import ctypes
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch

from qmix.instruction_sets import ISAS
from qmix.kernels.cpu import ctypes_structs as structs
from qmix.kernels.cpu.build import FLAGS
from qmix.kernels.cpu.pointers import matrix_of
from qmix.weights.scales import NestedScales
from tests.support.cpu_kernels import random_affine, random_int4, random_nf4, random_table, seeded
from tests.support.models import ROOT

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
DRIVER = ROOT / "tests" / "kernels" / "cpu" / "arm_driver.cpp"
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 17, 40)
AFFINE = {
    "symmetric": {},
    "zeros": {"zeros": torch.uint8},
    "float zeros": {"zeros": torch.float16},
    "biases": {"biases": torch.float16},
    "nested biases": {"scales": "6 bits of 8", "biases": "6 bits of 8"},
}


def weights():
    yield from (random_nf4(33, 768), random_nf4(7, 320, nested=True), random_int4(11, 384, 3, True))
    for bits in (2, 3, 4, 5, 6, 8):
        for form in AFFINE.values():
            for group in (16, 32, 64, 128):
                yield random_affine(11, 768 if group < 128 else 1024, bits, group, **form)
    for kind in ("nf4", "fp4", "e2m1", "iq4"):
        for block in (16, 32, 64, 256):
            yield random_table(10, 512, kind, block, torch.float16, high_first=block == 64)
    for worst in (0x00, 0xFF, 0xF0):
        for weight in (random_nf4(9, 512), random_affine(9, 512, 8, 64), random_affine(9, 512)):
            weight.codes.fill_(worst)
            yield weight


def block(data):
    return struct.pack("<q", len(data)) + data


def stored(tensor):
    return block(b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes())


def values(part, pointers):
    nested = isinstance(part, NestedScales)
    arrays = (part.codes, part.outer, part.map) if nested else (part, None, None)
    numbers = (pointers.block, pointers.start, pointers.step, pointers.offset)
    kinds = (pointers.kind, pointers.outer_kind)
    return b"".join(map(stored, arrays)) + struct.pack("<qfffii", *numbers, *kinds)


def written(weight, x, quantize):
    matrix: structs.Matrix = matrix_of(weight, [])
    table = (ctypes.c_float * 16).from_address(matrix.table)
    parts = (weight.scales, getattr(weight, "zeros", None), getattr(weight, "biases", None))
    pointers = (matrix.scales, matrix.zeros, matrix.biases)
    sizes = (matrix.rows, matrix.inputs, matrix.block, matrix.bits, matrix.high_first)
    return b"".join(
        (
            stored(weight.codes),
            block(bytes(table)),
            *map(values, parts, pointers),
            struct.pack("<qqqii", *sizes),
            stored(x),
            struct.pack("<qi", len(x), quantize),
        )
    )


def inputs(weight, tokens, quantize):
    x = torch.randn(tokens, weight.shape[1], generator=seeded(tokens))
    x[0, 5] = 500.0
    return x.bfloat16().float() if quantize else x


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="no cross compiler and emulator for Arm")
@pytest.mark.parametrize("isa", ["neon", "i8mm"])
def test_every_kind_of_weight_is_multiplied_as_in_float64(isa, tmp_path):
    program, sent, received = (tmp_path / name for name in ("driver", "cases", "products"))
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    command = [COMPILER, *flags, *ISAS[isa].flags, "-O1", "-static", "-o", program, DRIVER]
    subprocess.run(command, check=True)
    cases = [
        (weight, inputs(weight, TOKENS[number % len(TOKENS)], quantize), quantize)
        for number, weight in enumerate(weights())
        for quantize in (0, 1)
    ]
    data = b"".join(written(*case) for case in cases)
    sent.write_bytes(struct.pack("<q", len(cases)) + data)
    subprocess.run([EMULATOR, "-cpu", "max", program, sent, received], check=True, timeout=600)
    products = torch.from_numpy(np.fromfile(received, np.float32)).double()
    largest = [0.0, 0.0]
    for weight, x, quantize in cases:
        dense = weight.dequantize(torch.float32).double()
        exact = x.double() @ dense.T
        found, products = products[: exact.numel()].view_as(exact), products[exact.numel() :]
        size = x.double().norm(dim=1, keepdim=True) * dense.norm(dim=1) + 1e-30
        error = float(((found - exact).abs() / size).max())
        largest[quantize] = max(largest[quantize], error)
    assert len(products) == 0
    print(f"{isa}: {len(cases)} products, largest errors {largest[0]:.1e}, {largest[1]:.1e}")
    assert largest[0] < 4e-7
    assert largest[1] < 4e-5
