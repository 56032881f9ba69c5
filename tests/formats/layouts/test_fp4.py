"""NVFP4 and MXFP4: read to the bits of their tools, and refused where they are damaged."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qmix.formats import open_checkpoint
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.weights.dense import Dense
from qmix.weights.table import Table
from tests.support.golden import COMPRESSED, MODELOPT, expected_weights, golden_folder

FP4 = [(MODELOPT, "nvfp4"), (MODELOPT, "nvfp4-experts"), (COMPRESSED, "nvfp4"),
       (COMPRESSED, "mxfp4"), (COMPRESSED, "mixed")]  # fmt: skip
P = "model.layers.0.block_sparse_moe.experts.1.w2"
IDS = torch.tensor([[5, 6, 7, 33, 3], [1, 0, 2, 63, 4]])

pytestmark = pytest.mark.filterwarnings("ignore:.*are not used", "ignore:.*FP8 weights")


@pytest.mark.parametrize(("maker", "name"), FP4)
def test_the_values_are_those_of_the_maker_in_float32(maker, name):
    checkpoint = open_checkpoint(golden_folder(maker, name))
    expected = expected_weights(maker, name)
    exact = {module: values for module, values in expected.items() if values.dtype == torch.float32}
    rounded = {module: values for module, values in expected.items() if module not in exact}
    seen = 0
    for tensor in checkpoint.tensors:
        if not tensor.linear or not checkpoint.packing(tensor):
            continue
        weight = checkpoint.weight(tensor)
        if isinstance(weight, Dense):
            continue
        assert isinstance(weight, Table)
        assert weight.scheme == checkpoint.metadata.scheme_of(checkpoint.packing(tensor))
        assert weight.scheme.bits_per_weight <= 4.6
        assert weight.nbytes <= weight.scheme.nbytes(weight.shape) + 4
        values = weight.dequantize(torch.float32)
        for key in (tensor.prefix, f"{tensor.prefix}.float32"):
            if key in exact:
                assert torch.equal(values, exact[key])
                seen += 1
        if tensor.prefix in rounded:
            assert torch.equal(weight.dequantize(torch.bfloat16), rounded[tensor.prefix])
    assert seen >= 1


@pytest.mark.parametrize(("maker", "name"), FP4)
def test_logits_are_those_of_a_dense_model_of_the_same_weights(maker, name, tmp_path):
    folder = golden_folder(maker, name)
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    checkpoint = open_checkpoint(folder)
    tensors = {
        t.name: (
            checkpoint.weight(t).dequantize(torch.float32)
            if checkpoint.packing(t)
            else checkpoint.read(t.name)
        )
        for t in checkpoint.tensors
    }
    save_file({name: data.contiguous() for name, data in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    dense = MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        difference = (model(input_ids=IDS).logits - dense(input_ids=IDS).logits).abs().max()
    assert float(difference) < 1e-5
