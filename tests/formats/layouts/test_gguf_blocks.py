"""Blocks of GGUF, written: the bytes that llama.cpp's own quantizer wrote."""

import pytest
import torch

from qmix.formats.layouts import gguf, gguf_blocks
from qmix.weights.dense import Dense
from tests.support.gguf_files import golden_rows


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL"])
def test_blocks_that_are_read_are_written_byte_for_byte(kind):
    blocks, values = golden_rows(kind)
    weight = gguf.unpack(blocks, kind, "name", "file", tuple(values.shape))
    assert torch.equal(gguf_blocks.pack(weight, kind), blocks)


def test_dense_rows_are_their_bytes():
    data = torch.arange(128, dtype=torch.bfloat16).view(2, 64)
    rows = gguf_blocks.pack(Dense(data), "BF16")
    assert torch.equal(rows.view(torch.bfloat16), data)
