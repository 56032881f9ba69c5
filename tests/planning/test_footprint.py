"""The planner against reality: predicted bytes and those of models that were loaded.

Bytes of every layout, and of the packed one, are in test_stored_bytes.
"""

import json
import sys

import pytest
import torch

from qmix.evals import footprint as reality
from qmix.evals import synthetic
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.planning.device_footprint import on_device
from qmix.planning.stored_model import StoredModel
from qmix.weights.scheme import NF4, Scheme
from tests.support.models import quantized, small_model
from tests.support.process import finished

SCHEMES = {
    "nf4": NF4,
    "nf4 plain": Scheme(kind="nf4", double_quant=False),
    "int4": Scheme(kind="int4"),
    "int4 asymmetric": Scheme(kind="int4", group_size=32, symmetric=False),
    "int4 per output": Scheme(kind="int4", group_size=-1),
}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_dense_tiny_model(tiny, dtype):
    found = reality.compare_footprint(tiny, 512, dtype)
    assert abs(found.error) < 0.0001
    assert found.predicted_cache == found.cache


@pytest.mark.parametrize("name", SCHEMES)
def test_the_tiny_model_in_four_bits(tiny, tmp_path, name):
    directory = quantized(tiny, tmp_path / "out", SCHEMES[name], method="rtn")
    found = reality.compare_footprint(directory, 512)
    assert abs(found.error) < 0.001
    assert found.predicted_cache == found.cache
    metadata = read_metadata(directory)
    read, assumed = (
        StoredModel.of(metadata),
        StoredModel.assume("x", metadata.config, SCHEMES[name]),
    )
    assert assumed.file_bytes == pytest.approx(read.file_bytes, rel=0.001)
    assert on_device(assumed).total == on_device(read).total


def test_an_expert_of_full_width_in_packed_layout():
    from qmix.weights.expert import Expert
    from qmix.weights.packed.layout import pack_expert

    config = synthetic.config(1, packed=True)
    hidden, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    w1, w3 = (synthetic._random_nf4((inner, hidden), generator) for _ in range(2))
    expert = Expert(w1=w1, w2=synthetic._random_nf4((hidden, inner), generator), w3=w3)
    assert (
        pack_expert(expert).blob.nbytes
        == on_device(StoredModel.assume("x", config, NF4)).experts[0]
    )


def test_the_cache_of_any_shape(tmp_path):
    for changes in ({}, {"sliding_window": 64}, {"num_key_value_heads": 8}):
        model = small_model(**changes)
        model.save_pretrained(tmp_path / str(len(changes)) / str(changes.get("sliding_window")))
        shape = StoredModel.of(
            read_metadata(tmp_path / str(len(changes)) / str(changes.get("sliding_window")))
        )
        for batch, context in ((1, 100), (3, 512)):
            assert model.new_cache(batch, context).nbytes == shape.kv_bytes(context, batch)


@pytest.mark.soak
def test_two_layers_of_full_width(tmp_path):
    synthetic.write_synthetic(tmp_path / "syn", 2, packed=True, seed=0)
    options = ["--ctx", "4096", "--json"]
    done = finished([sys.executable, "-m", "qmix.evals.footprint", tmp_path / "syn", *options])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["error"]) < 0.001
    assert found["weights"] > 2e9
    if found["resident"] is not None:
        predicted = found["predicted_weights"] + found["predicted_cache"]
        assert predicted == pytest.approx(found["resident"], rel=0.02)


def test_the_command(tiny_nf4, capsys):
    assert reality.main([str(tiny_nf4), "--ctx", "64"]) == 0
    assert "predicted" in capsys.readouterr().out
    assert reality.main(["/nowhere"]) == 3
    assert "no such directory" in capsys.readouterr().err


def test_metadata_and_checkpoint_agree(tiny_nf4):
    metadata, checkpoint = read_metadata(tiny_nf4), open_checkpoint(tiny_nf4)
    assert metadata.tensors == checkpoint.tensors
    assert f"torch.{metadata.dtype}" == str(checkpoint.dtype)
    for tensor in metadata.tensors:
        packed = metadata.packing(tensor)
        weight = checkpoint.weight(tensor) if packed else None
        assert weight is None or weight.scheme == metadata.scheme_of(packed)
