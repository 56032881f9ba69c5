"""GGUF's types against what gguf.quants makes of the same blocks, bit for bit."""

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.formats.layouts import gguf
from qmix.formats.layouts.gguf_schemes import SCHEMES
from qmix.gguf.tensor_types import QUANTIZED
from qmix.weights.affine import Affine
from qmix.weights.scales import NestedScales
from qmix.weights.table import Table
from tests.support.gguf_files import golden_rows

MOST_BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5,
    "Q4_K": 4.5,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "Q2_K": 2.875,
    "Q3_K": 3.4375,
    "IQ3_XXS": 4.25,
    "IQ3_S": 4.25,
    "IQ2_XS": 4.4375,
}
# Where a block's float16 scale begins, and a pattern that is infinite.
SCALES = {
    **dict.fromkeys(QUANTIZED, (0, b"\0\x7c")),
    "Q6_K": (208, b"\0\x7c"),
    "Q2_K": (80, b"\0\x7c"),
    "Q3_K": (108, b"\0\x7c"),
    "IQ1_M": (48, b"\0\x00\0\x00\0\xc0\0\x70"),
    "MXFP4": (0, b"\xfd"),
}


def unpacked(kind):
    blocks, values = golden_rows(kind)
    return gguf.unpack(blocks, kind, "blk.0.attn_q.weight", "m.gguf", tuple(values.shape)), values


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_those_of_gguf(kind):
    weight, values = unpacked(kind)
    got = weight.dequantize(torch.float32)
    made = got[:2].view(torch.int32), values[:2].view(torch.int32)
    assert torch.equal(*made), "rows of llama.cpp's quantizer, bit for bit"
    assert torch.equal(got, values), "random blocks: zeros may have another sign"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_nothing_grows_beyond_its_scheme(kind):
    weight, values = unpacked(kind)
    assert weight.scheme == SCHEMES[kind] or str(weight.scheme) == str(SCHEMES[kind])
    assert weight.nbytes == SCHEMES[kind].nbytes(tuple(values.shape))
    if kind in MOST_BITS:
        assert 8 * weight.nbytes / values.numel() == MOST_BITS[kind]
        assert isinstance(weight, Table) or weight.bits <= 4


def test_the_scales_of_k_quants_stay_nested():
    weight, _ = unpacked("Q4_K")
    assert isinstance(weight, Affine)
    assert isinstance(weight.scales, NestedScales)
    assert isinstance(weight.biases, NestedScales)
    assert weight.scales.bits == 6


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_are_taken_without_unpacking(kind):
    weight, values = unpacked(kind)
    rows = torch.tensor([2, 0])
    assert torch.equal(weight.take(rows).dequantize(torch.float32), values[rows])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_scale_that_is_not_finite_is_refused(kind):
    blocks, values = golden_rows(kind)
    damaged = blocks.clone()
    start, infinite = SCALES[kind]
    damaged[1, start : start + len(infinite)] = torch.tensor(list(infinite), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=f"a scale of {kind} is NaN or infinite"):
        gguf.unpack(damaged, kind, "t", "m.gguf", tuple(values.shape))


def test_another_shape_is_refused():
    blocks, _ = golden_rows("Q4_0")
    with pytest.raises(CheckpointError, match="wrong shape"):
        gguf.unpack(blocks, "Q4_0", "t", "m.gguf", (3, 480))
