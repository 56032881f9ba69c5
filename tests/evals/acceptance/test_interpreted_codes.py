"""What a rehearsal looks up is what the assembly computes."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")

import triton.language as tl

from qmix.evals.acceptance.interpreted_codes import look_up
from qmix.kernels.gpu import ptx
from qmix.weights.packed.codes import TABLES
from tests.support.ptx.inline_assembly import execute


def operands(words):
    """Every byte, and the words that the instructions want beside it."""
    bytes_ = np.arange(256, dtype=np.uint8)
    return [
        SimpleNamespace(data=data) for data in (bytes_, *(np.full(256, w, "u4") for w in words))
    ]


@pytest.mark.parametrize("kind", [*TABLES, "int4"])
def test_every_code_has_its_value(kind):
    if kind == "int4":
        assembly, constraints = ptx.INT4_INSTRUCTIONS, ptx.INT4_CONSTRAINTS
        words = ptx.INT4_WORDS
    else:
        assembly, constraints = ptx.TABLE_INSTRUCTIONS[kind], ptx.TABLE_CONSTRAINTS
        words = TABLES[kind].words
    given = (None, assembly, constraints, operands(words), [tl.float16, tl.float16], False, 4)
    for looked_up, executed in zip(look_up(*given).handles, execute(*given).handles, strict=True):
        assert (looked_up.data == executed.data).all()


@pytest.mark.parametrize("bits", ptx.SLICED_INSTRUCTIONS)
def test_every_code_in_slices_has_its_value(bits):
    drawn = np.random.default_rng(0).integers(0, 256, (bits, 4096), np.uint8)
    kept = [np.full(4096, word, "u4") for word in ptx.SLICED_WORDS[bits]]
    given = [SimpleNamespace(data=data) for data in (*drawn, *kept)]
    texts = ptx.SLICED_INSTRUCTIONS[bits], ptx.SLICED_CONSTRAINTS[bits]
    arguments = (None, *texts, given, [tl.float16] * 8, False, 4)
    found = look_up(*arguments).handles
    assert len(found) == 8
    for looked_up, executed in zip(found, execute(*arguments).handles, strict=True):
        assert (looked_up.data == executed.data).all()
