"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The sources that ship are compiled by the code that ships, with a $CXX that adds the sanitizers.
Their runtime must be there from the start of a process, so the tests run in one of its own.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.models import ROOT
from tests.support.soak import seconds_left

pytestmark = pytest.mark.soak

CXX = ROOT / "tests" / "support" / "sanitized_cxx.sh"
# Every test that calls the kernels, at the shapes that have errors of their own to find.
TESTS = (
    "tests/soak/test_kernel_shapes.py",
    "tests/kernels/cpu/test_matmul.py",
    "tests/kernels/cpu/test_kinds.py",
    "tests/kernels/cpu/test_packed_moe.py",
    "tests/kernels/cpu/test_worst_case.py",
    "tests/nn/test_cpu_decode.py",
)
SECONDS = 1800  # the compilation takes 20 of a core
NEEDED = 600  # seconds of a soak that are left

CUT = """
import torch
from dataclasses import replace
from qmix import kernels
from qmix.kernels.cpu.library import library
from tests.support.cpu_kernels import random_nf4
assert library().isa
weight = random_nf4(5, 64)
kernels.linear(torch.ones(1, 64), weight)
print("whole", flush=True)
kernels.linear(torch.ones(1, 64), replace(weight, codes=weight.codes[:-1].clone()))
"""


def runtime(compiler, name):
    """The path of a library of the compiler's; None if it has none."""
    asked = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
    )
    path = asked.stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.fixture(scope="module")
def sanitized():
    """The environment of a process whose kernels are compiled with the sanitizers."""
    compiler = shutil.which("g++")
    if seconds_left() < NEEDED:
        pytest.skip(f"a soak that has {NEEDED // 60} minutes left")
    libraries = compiler and [runtime(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    if not libraries or None in libraries:
        pytest.skip("no g++ with the AddressSanitizer's library")
    return {
        **os.environ,
        "CXX": str(CXX),
        "LD_PRELOAD": ":".join(libraries),
        # What Python never frees is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_the_sanitizers_have_nothing_to_say(sanitized):
    every = ("-m", "soak or not soak", "-W", "error:4-bit matmuls run on torch")
    done = run(sanitized, "-m", "pytest", "-q", "-x", *every, *TESTS)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "Sanitizer" not in said
    assert "no portable on this processor, or no compiler" not in said
    print(said.strip().splitlines()[-1])


def test_a_read_past_a_weight_would_be_found(sanitized):
    done = run(sanitized, "-c", CUT)
    assert done.stdout == "whole\n"
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert done.returncode != 0
