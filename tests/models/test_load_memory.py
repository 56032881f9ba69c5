"""What loading takes beside the model: one weight at a time, packed in chunks."""

import pytest
import torch

from qmix.formats import open_checkpoint
from qmix.models import load, read_ahead
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.pack import Packer
from qmix.planning.budget import READ_AHEAD
from qmix.weights.packed import planes
from qmix.weights.scheme import NF4, Scheme
from tests.support.live_bytes import LiveBytes
from tests.support.models import quantized, write_dense

HIDDEN, INNER = 256, 512
# The 8x7B's expert has 176 M weights: with so many bytes for each of an expert's weights beside the
# model, loading it takes 1 GiB.
ALLOWED = (1 << 30) / (3 * 4096 * 14336)


def test_the_memory_of_tensors_is_counted_until_the_last_view_is_gone():
    outside = torch.ones(1000)
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[10:20]
        _ = outside[5:]
        second = first + 1
        assert (live.now, live.peak) == (800, 800)
        del first, second
        assert (live.now, live.peak) == (400, 800)
        del view
        assert live.now == 0
        for _ in range(3):
            torch.zeros(300).add(1)
    assert (live.now, live.peak) == (0, 2400)


class Upload:
    """Copies at once from buffers, where the host's memory stands in for the device's."""

    def __init__(self, nbytes):
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(READ_AHEAD)]

    def buffer(self, index):
        return self._buffers[index]

    def copied(self, index, tensors):
        return {name: tensor.clone() for name, tensor in tensors.items()}


def loaded(folder, monkeypatch):
    """The model, read ahead and packed layer by layer as on a GPU, and the memory of that.

    What the reading thread allocates is the host's, and is not counted.
    """
    checkpoint = open_checkpoint(folder)
    upload = Upload(read_ahead.buffer_bytes(checkpoint, checkpoint.tensors))
    monkeypatch.setattr(
        load, "read_all", lambda own, tensors, _: read_ahead.read_ahead(own, tensors, upload)
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(checkpoint.config)
    packer = Packer()
    with LiveBytes() as live, torch.no_grad():
        load.fill(
            model.checkpoint_modules(),
            checkpoint,
            torch.bfloat16,
            torch.device("cpu"),
            packer.pack,
        )
        resident = live.now
    assert packer.complete, packer
    return model, resident, live.peak


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        (NF4, "nf4"),
        pytest.param(
            Scheme(kind="int4", group_size=64, symmetric=False), "rtn", marks=pytest.mark.soak
        ),
    ],
    ids=["nf4", "int4 asymmetric"],
)
def test_loading_a_model_takes_little_beside_it(tmp_path, monkeypatch, scheme, method):
    monkeypatch.setattr(planes, "CHUNK_ELEMENTS", HIDDEN * INNER // 16)  # as 2^22 of a real matrix
    dense = write_dense(
        tmp_path / "dense",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_local_experts=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    folder = quantized(dense, tmp_path / "packed", scheme, method=method)
    model, resident, peak = loaded(folder, monkeypatch)
    weights = 3 * HIDDEN * INNER
    assert resident > 2 * 8 * weights / 2
    assert peak - resident <= ALLOWED * weights, (peak - resident) / weights
    assert model.model.layers[1].block_sparse_moe.stored.packed is not None
