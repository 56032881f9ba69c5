"""qmix quantize of what is quantized already: named and refused, or rounded again if asked."""

import json
from dataclasses import replace

import pytest
import torch

from qmix.errors import UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.weights import nf4
from qmix.weights.scheme import NF4
from tests.support.every_layout import EVERY

NF4_AGAIN = QuantizeRequest(method="nf4", requantize=True)
# One of each tool; the others are left to make soak. FP8 is a source like 16 bits.
ONE_EACH = (
    *("awq", "compressed", "hqq-0.2.8", "gguf Q4_K", "mlx-0.32.4/affine4", "auto-round-0.16.0"),
    *("compressed-tensors-0.20.0/nvfp4", "modelopt-0.47.0/nvfp4", "gptqmodel-7.7.0"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_EACH else pytest.mark.soak)
        for name in EVERY
        if "fp8" not in name
    ],
)
def test_every_layout_is_named_and_then_rounded_from_what_it_decodes_to(name, tmp_path):
    source = EVERY[name](tmp_path / "source")
    checkpoint = open_checkpoint(source)
    layouts = {p.layout for p in map(checkpoint.packing, checkpoint.tensors) if p is not None}
    with pytest.raises(
        UnsupportedError, match=r"quantized already.*qmix export.*--requantize"
    ) as e:
        quantize_checkpoint(source, tmp_path / "out", replace(NF4_AGAIN, requantize=False), None)
    assert any(f" as {layout}, " in str(e.value) for layout in layouts)
    quantize_checkpoint(source, tmp_path / "out", NF4_AGAIN, None)
    made = open_checkpoint(tmp_path / "out")
    for tensor in made.tensors:
        numbers = checkpoint.dense(tensor)
        if not made.packed(tensor):
            assert torch.equal(made.read(tensor.name), numbers.to(made.dtype))
        else:
            weight, expected = made.weight(tensor), nf4.quantize(numbers, NF4)
            assert torch.equal(weight.codes, expected.codes)
            assert torch.equal(weight.scales.codes, expected.scales.codes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    fields = {LAYOUT_OF[layout].field for layout in layouts} - {None}
    assert not fields & config.keys()
