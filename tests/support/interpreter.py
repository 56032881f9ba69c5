"""Triton kernels in a process of their own: interpreted, as PTX on the CPU, or on a GPU.

The files `interpreted_*.py` run in that process and take their device, their poisoned memory and
their drawn inputs from here; other tests start it. The flag is read when a kernel is defined, so an
interpreted process can neither compile nor launch.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.support.models import ROOT

AS_PTX = os.environ.get("QMIX_TESTS_PTX") == "1"  # tests.support.ptx runs what Triton compiles
SOAK = os.environ.get("QMIX_TESTS_SOAK") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or AS_PTX
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter multiplies bfloat16, the dtype of real models, wrongly.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# The largest error of a rounding to nearest, relative; float32's counts as none.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Triton 3.6's interpreter, in every loop whose bound is known at run time only.
CONVERSIONS = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def _leave_out_what_is_slow():
    """What takes half the time of Triton's interpreter and is the same again each time.

    Triton patches its language anew at every call of a device function. It stays patched until the
    launch ends, so that once for each module of functions is enough. It builds a table of its types
    whenever it looks one up. And all integer arithmetic is done again in 64 bits, to find an
    overflow: that is left to the soak.
    """
    from triton.runtime import interpreter

    of_pointers, of_elements = np.dtype(np.uint64), cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda each: (
        of_pointers if each.scalar.is_ptr() else of_elements(each.scalar)
    )
    if not SOAK:
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module in patched:
            return None  # to a device function, which has no use for it
        patched.add(module)
        return patch(function)

    def launch_patched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched


if AS_PTX:
    from tests.support.ptx.device import Device, install

    install(Device())
elif INTERPRETED:
    from tests.support.ptx import inline_assembly

    _leave_out_what_is_slow()
    inline_assembly.install()


def run_apart(*names, interpreted, soak=False, as_ptx=False):
    """Run each tests/kernels/interpreted_`name`.py to its end; what is chosen must pass.

    Args:
        soak: run what the soak runs, in place of all else.
        as_ptx: compile the kernels and run their PTX with tests.support.ptx.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["QMIX_TESTS_SOAK"] = str(int(soak))
    if interpreted:  # one thread: the interpreter's tensors are too small for more
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if as_ptx:
        environment |= {"QMIX_TESTS_PTX": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "tests" / "kernels" / f"interpreted_{name}.py") for name in names]
    chosen = ["-m", "soak" if soak else "not soak"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        *chosen,
        *paths,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    return done.stdout


def skip_without_a_device():
    """Skip the whole module that calls it where nothing can run its kernels."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("neither an interpreter nor a CUDA device", allow_module_level=True)


def drawn(*shape, seed=1, dtype=torch.float32):
    """Normal values that are float16, on the device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.half().to(DEVICE, dtype)


def error(out, oracle):
    """The norm of the difference, relative to the oracle's; all of `out` must be finite."""
    assert out.shape == oracle.shape
    assert torch.isfinite(out).all()
    norm = oracle.float().norm()
    difference = (out.float() - oracle.float()).norm()
    return (difference / norm).item() if norm else difference.item()


class Recorder:
    """Stands for a kernel: keeps its grids and constants, computes nothing."""

    def __init__(self):
        self.grids, self.constants = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **constants: self.constants.append(constants)
