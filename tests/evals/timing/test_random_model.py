"""Random models in the packed layout: sizes of weights, bytes, the true model on meta."""

import pytest
import torch

from qmix.config import MixtralConfig
from qmix.evals.timing import random_model, traffic
from qmix.weights.packed.layout import unpack_matrix
from tests.support.models import small_config


@pytest.mark.parametrize("name", random_model.FORMATS)
def test_weights_are_of_normal_size(name):
    weights = random_model.RandomWeights(
        random_model.FORMATS[name], torch.device("cpu"), torch.bfloat16, seed=1
    )
    matrix = weights.matrix((256, 512))
    weight = unpack_matrix(matrix).dequantize(torch.float32)
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    # Integers are -0.5 on average: 0.22 of the size of those of three bits.
    assert abs(weight.mean().item()) < 0.25 * 512**-0.5
    assert torch.equal(unpack_matrix(matrix).codes, unpack_matrix(matrix).codes)
    other = weights.matrix((256, 512))
    assert not torch.equal(other.blob, matrix.blob)
    assert len(matrix.blob) == matrix.format.matrix_bytes((256, 512))


def test_a_seed_gives_the_same_model():
    config = small_config(hidden_size=128, intermediate_size=128, num_attention_heads=4)
    one, other = (
        random_model.build_random_model(config, random_model.NF4, torch.device("cpu"), seed=3)
        for _ in range(2)
    )
    blobs = [
        m.model.layers[1].block_sparse_moe.stored.packed.table.blobs[0][5] for m in (one, other)
    ]
    assert torch.equal(*blobs)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    ids = torch.arange(3, 9)[None]
    with random_model_reference(), torch.no_grad():
        logits = one(ids).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def random_model_reference():
    from qmix import kernels

    return kernels.override("reference")


@pytest.mark.parametrize("name", random_model.FORMATS)
def test_the_whole_mixtral_on_meta(name):
    """46.7 B weights, as in the 8x7B, with 3.125 to 4.25 bits each except the 16-bit ones."""
    model = random_model.build_random_model(
        MixtralConfig(), random_model.FORMATS[name], torch.device("meta")
    )
    assert traffic.weight_count(model) == 46_702_792_704
    packed = 46_439_333_888 - 0
    dense = 46_702_792_704 - packed
    bits = {"nf4": 4.25, "int4": 4.125, "int3": 3.125}[name]
    assert traffic.weight_bytes(model) == pytest.approx(packed * bits / 8 + 2 * dense, rel=1e-3)
