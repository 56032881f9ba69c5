"""What loading takes beside the model: one weight at a time, packed in chunks."""

import math

import pytest
import torch

from qmix.formats import open_checkpoint
from qmix.formats.files.spans import Together
from qmix.models import load, read_ahead
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.pack import Packer
from qmix.planning.budget import READ_AHEAD
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.packed import planes
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.tile_format import PANEL
from qmix.weights.scheme import NF4, Scheme
from tests.support.every_layout import EVERY
from tests.support.live_bytes import LiveBytes
from tests.support.models import quantized, write_dense
from tests.support.packed import KINDS, OTHERS
from tests.support.soak import one_in

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
        load,
        "read_all",
        lambda own, tensors, _: read_ahead.read_ahead(own, tensors, Together(), upload),
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


FORMS = {**KINDS, **OTHERS}


@pytest.mark.parametrize("kind", one_in(6, FORMS))
def test_packing_an_expert_of_any_form_takes_little_beside_it(kind, monkeypatch):
    """Beside the packed one: the expert as it was read, and what packing needs meanwhile."""
    monkeypatch.setattr(planes, "CHUNK_ELEMENTS", HIDDEN * INNER // 16)
    w1, w2, w3 = (
        FORMS[kind](*shape, seed)
        for seed, shape in enumerate(((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)))
    )
    with LiveBytes() as live:
        blob = pack_expert(Expert(w1, w2, w3)).blob
    beside = live.peak - blob.nbytes + w1.nbytes + w2.nbytes + w3.nbytes
    assert beside <= ALLOWED * 3 * HIDDEN * INNER


@pytest.mark.parametrize("name", one_in(10, EVERY))
def test_every_layout_takes_little_beside_its_weights(name, tmp_path, monkeypatch):
    """Its tensors, the weight that is built of them if a GPU does that, and packing the weight.

    As many of its rows as a panel has, over and over: rows are packed alike.
    """
    monkeypatch.setattr(planes, "CHUNK_ELEMENTS", 1 << 12)
    checkpoint = open_checkpoint(EVERY[name](tmp_path / "m"))
    experts = [tensor for tensor in checkpoint.tensors if tensor.kind == "expert"][:3]
    for tensor in experts:
        stored = checkpoint.read_all(tensor)
        if checkpoint.built_anywhere(tensor):
            with monkeypatch.context() as device, LiveBytes() as live:
                device.setattr(torch.Tensor, "is_cpu", False)
                weight = checkpoint.built(tensor, stored)
            read = sum(part.nbytes for part in stored.values())
            assert read + live.peak <= ALLOWED * math.prod(weight.shape)
        else:
            weight = checkpoint.built(tensor, stored)
        if isinstance(weight, Dense) or weight.shape[1] % 32:
            continue
        many = weight.take(torch.arange(4 * PANEL) % weight.shape[0])
        with LiveBytes() as live:
            packed = pack_matrix(many)
        beside = live.peak - packed.blob.nbytes + many.nbytes
        assert beside <= ALLOWED * math.prod(many.shape)
