"""Large weights in host memory stand on huge pages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qmix.nn.linear import Linear
from qmix.weights import huge_pages
from tests.support.cpu_kernels import random_int4

pytestmark = pytest.mark.skipif(
    not huge_pages.available(), reason="this system gives no huge pages"
)


def huge_bytes(tensor):
    """How much of the mappings that hold a tensor stands on huge pages."""
    start, stop, total, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(text, 16) for text in found.groups())
            inside = first < stop and start < last
        elif inside and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total


def test_a_weight_that_a_module_takes_moves_there():
    weight = random_int4(4096, 4096, 32)  # 8 MiB of codes
    codes = weight.codes.clone()
    linear = Linear(4096, 4096)
    linear.store(replace(weight, codes=codes))
    kept = linear.stored.codes
    assert kept.data_ptr() == codes.data_ptr()
    assert torch.equal(kept, weight.codes)
    if huge_bytes(kept) < 2 * huge_pages.PAGE:
        pytest.skip("a kernel that moves pages in the background, or has no free ones")


def test_memory_that_is_written_later_has_them_from_the_start():
    memory = torch.empty(16 << 20, dtype=torch.uint8)
    huge_pages.ask(memory)
    memory.zero_()
    if huge_bytes(memory) < 6 * huge_pages.PAGE:
        pytest.skip("no free huge pages")


def test_what_is_small_or_strided_is_left_alone():
    small, strided = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(4096, 8192).T
    for tensor in (small, strided):
        huge_pages.gather(tensor)
        assert not tensor.any()
