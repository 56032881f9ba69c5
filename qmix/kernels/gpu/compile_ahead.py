"""Kernels compiled side by side before they are launched: the compiler takes longer than a trial.

Knows no kernel. Imports triton inside.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from qmix.kernels.gpu.launch import only_compiling

_MOST_THREADS = 16


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within the block launches start nothing, but let their kernels be compiled in threads.

    The end of the block waits for them. A kernel that does not compile says so at its launch.
    """
    from triton import AsyncCompileMode

    with (
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
        only_compiling(),
    ):
        yield
