"""Experts of every type that is kept: read into a blob, and multiplied as they are."""

import pytest
import torch

from qmix.experts.reader import ExpertReader
from qmix.formats import open_checkpoint
from qmix.gguf.tensor_types import BY_NAME, QUANTIZED
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.planning.stored_model import StoredModel
from qmix.weights.blob import expert_bytes
from tests.support.gguf_files import gguf_bytes, golden_rows, mixtral_metadata, mixtral_tensors
from tests.support.models import ids, small_model

WIDTH = 256


@pytest.fixture(scope="module", params=QUANTIZED)
def checkpoint(request, tmp_path_factory):
    """A model whose experts are made of blocks of llama.cpp's quantizer, in some order."""
    model = small_model(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1)
    tensors, kind = mixtral_tensors(model), BY_NAME[request.param]
    blocks = golden_rows(kind.name)[0][0].view(-1, kind.block_bytes)
    generator = torch.Generator().manual_seed(3)
    for name, (_, shape, _) in tensors.items():
        if "_exps" in name:
            count = shape[0] * shape[1] * WIDTH // kind.block_size
            chosen = torch.randint(len(blocks), (count,), generator=generator)
            tensors[name] = (kind.name, shape, blocks[chosen].numpy().tobytes())
    path = tmp_path_factory.mktemp(kind.name) / "m.gguf"
    path.write_bytes(gguf_bytes(mixtral_metadata(model.config), tensors))
    return open_checkpoint(path)


def test_an_expert_fits_its_blob(checkpoint):
    reader = ExpertReader(checkpoint, torch.float32, lambda weight, _: weight)
    blob = torch.empty(reader.blob_bytes, dtype=torch.uint8)
    stored = StoredModel.of(checkpoint.metadata)
    assert max(
        expert_bytes(w.blob_bytes(4) for w in each) for each in stored.expert_weights
    ) == len(blob)
    start, stop = blob.data_ptr(), blob.data_ptr() + len(blob)
    for expert in (0, 5):
        inside, outside = reader.read(expert, blob), reader.load(expert)
        for name in ("w1", "w2", "w3"):
            weight = getattr(inside, name)
            assert start <= weight.codes.data_ptr() < stop
            exact = getattr(outside, name).dequantize(torch.float32)
            assert torch.equal(weight.dequantize(torch.float32), exact)


def test_logits_are_those_of_the_dequantized_experts(checkpoint):
    path = checkpoint.metadata.directory
    packed = MixtralForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    dense = MixtralForCausalLM(checkpoint.config)
    dense.load_state_dict({t.name: checkpoint.dense(t).float() for t in checkpoint.tensors})
    prompt = ids(9)
    for tokens in (prompt, prompt[:, :1]):  # a prompt, and one token
        with torch.no_grad():
            got, expected = packed(tokens).logits, dense(tokens).logits
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
