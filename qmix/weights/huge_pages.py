"""Huge pages for large tensors in host memory.

A token reads every weight once, and each page of 4 KiB costs a look-up in the page table: with
pages of 2 MiB a matrix of 117 MB is read in 0.3 to 0.7 of the time (evals/LOG.md). Linux gives them
to whoever asks, unless it is set to never; elsewhere nothing is done.
"""

import ctypes
import mmap
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

PAGE = 2 << 20  # bytes of a huge page on x86-64 and, with pages of 4 KiB, on Arm
_LEAST = 2 * PAGE  # smaller tensors hold one whole page at most

_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask(tensor: Tensor) -> None:
    """Ask for huge pages for memory that is not yet written."""
    if _is_large(tensor):
        _advise(tensor, mmap.MADV_HUGEPAGE)


def gather(weight: object) -> None:
    """Move the tensors of a weight to huge pages, as far as they are not on them.

    Their addresses stay. A kernel before 6.1 moves them in the background, later.
    """
    if isinstance(weight, Tensor):
        ask(weight)
        if _is_large(weight):
            _advise(weight, _COLLAPSE)
    elif is_dataclass(weight):
        for field in fields(weight):
            gather(getattr(weight, field.name))


@cache
def available() -> bool:
    """Whether this system has huge pages and gives them to whoever asks."""
    if sys.platform != "linux":
        return False
    try:
        return "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def _is_large(tensor: Tensor) -> bool:
    on_host = tensor.device.type == "cpu" and tensor.is_contiguous()
    return on_host and tensor.nbytes >= _LEAST and available()


def _advise(tensor: Tensor, advice: int) -> None:
    """Call madvise for the whole pages of a tensor. A refusal leaves them as they are."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = last // mmap.PAGESIZE * mmap.PAGESIZE - start
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
