"""Experts of every layout kept in codes, read from their files: the bits of a whole load."""

import pytest
import torch

from qmix.experts.reader import ExpertReader, Region
from qmix.formats import open_checkpoint
from qmix.kernels import linear
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.weights.blob import TABLE_BYTES, blob_bytes
from tests.support.cpu_kernels import random_affine, random_table, seeded
from tests.support.models import GOLDEN, load_in_tiers

FOLDERS = [
    "compressed-tensors-0.20.0/mixed",
    "compressed-tensors-0.20.0/mxfp4",
    "compressed-tensors-0.20.0/nvfp4",
    "gguf-Q4_K_M.gguf",
    "hqq-0.2.8",
    "mlx-0.32.4/affine4",
    "mlx-0.32.4/affine4-g128",
    "mlx-0.32.4/affine8",
    "mlx-0.32.4/mixed",
    "mlx-0.32.4/mxfp4",
    "mlx-0.32.4/nvfp4",
    "modelopt-0.47.0/nvfp4",
    "modelopt-0.47.0/nvfp4-experts",
]


def logits(model):
    """Those of a prompt and of single tokens after it."""
    ids = torch.arange(1, 13)[None] * 7 % model.config.vocab_size
    cache = model.new_cache(1)
    with torch.no_grad():
        pieces = (ids[:, :4], *ids[:, 4:].split(1, 1))
        return [model(piece, past_key_values=cache).logits for piece in pieces]


@pytest.mark.filterwarnings("ignore::UserWarning")  # FP8 parts, scales of activations
@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_equal_bits_whatever_fits(folder):
    whole = MixtralForCausalLM.from_pretrained(GOLDEN / folder, device="cpu")
    expected = logits(whole)
    for host in (2, whole.config.num_local_experts):
        model = load_in_tiers(GOLDEN / folder, "cpu", tiers=Tiers(device=0, host=host))
        assert all(map(torch.equal, logits(model), expected))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_blob_holds_every_tensor_of_its_expert(folder):
    reader = ExpertReader(open_checkpoint(GOLDEN / folder), torch.bfloat16, lambda w, _: w)
    blob = torch.empty(reader.blob_bytes, dtype=torch.uint8)
    start, end = blob.data_ptr(), blob.data_ptr() + len(blob)
    for index in range(len(reader)):
        inside, alone = reader.read(index, blob), reader.load(index)
        for name in ("w1", "w2", "w3"):
            weight = getattr(inside, name)
            for tensor in tensors(weight):
                assert start <= tensor.data_ptr() < end
            dense = getattr(alone, name).dequantize(torch.float32)
            assert torch.equal(weight.dequantize(torch.float32), dense)


def tensors(weight):
    """All tensors of a weight, nested ones too."""
    for value in vars(weight).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "outer"):
            yield from tensors(value)


WEIGHTS = {
    "float zeros": {"zeros": torch.float16},
    "biases": {"biases": torch.bfloat16},
    "nested biases": {"scales": "6 bits of 8", "biases": "6 bits of 8"},
    "nested scales of 8 bits": {"bits": 8, "scales": "8 bits of 16"},
    "3 bits": {"bits": 3, "zeros": torch.uint8},
}


@pytest.mark.parametrize("kind", [*WEIGHTS, "table"])
def test_a_weight_that_is_moved_into_a_blob_is_the_same(kind):
    weight = random_table(48, 384) if kind == "table" else random_affine(48, 384, **WEIGHTS[kind])
    size = blob_bytes((weight.scheme.nbytes(weight.shape), *TABLE_BYTES))
    moved = Region(torch.empty(size, dtype=torch.uint8)).moved_in(weight)
    x = torch.randn(3, 384, generator=seeded()).bfloat16()
    assert torch.equal(linear(x, moved), linear(x, weight))
    pairs = zip(tensors(moved), tensors(weight), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
