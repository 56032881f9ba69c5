"""`qmix export`: another layout, the same numbers to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.commands.checkpoint.verify import verify
from qmix.errors import QmixError, UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import compressed_tensors, gptq_config
from qmix.formats.names import spellings
from tests.support import packers
from tests.support.packers import ASYMMETRIC, AWQ, SOURCES, equal, write
from tests.support.process import qmix

P = "model.layers.1.block_sparse_moe.experts.3.w2"


@pytest.mark.diagonal
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_same_weights_in_another_layout(tmp_path, name, layout):
    write(tmp_path / "in", name)
    result = export_checkpoint(tmp_path / "in", tmp_path / "out", layout)
    schemes = equal(tmp_path / "in", tmp_path / "out")
    assert result.weights == sum(scheme.integer for scheme in schemes.values()) > 0
    assert result.bytes_out == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    found = open_checkpoint(tmp_path / "out")
    (tensor,) = (t for t in found.tensors if t.prefix == P)
    assert found.packing(tensor).layout == {"gptq": "GPTQ"}.get(layout, layout)
    settings = found.config.quantization_config
    if layout == "gptq":
        said = gptq_config.parse(settings, "config.json")
        assert {module: said.scheme_of(module) for module in schemes} == schemes
        assert (settings["checkpoint_format"], settings["desc_act"]) == ("gptq", False)
        beside = json.loads((tmp_path / "out" / gptq_config.FILE).read_text())
        assert beside == settings
    else:
        assert settings == compressed_tensors.quantization_config(schemes)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"any"
    assert verify(tmp_path / "out").problems == ()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_gptq_holds_what_compressed_tensors_refuses_by_name(tmp_path, name):
    write(tmp_path / "in", name)
    export_checkpoint(tmp_path / "in", tmp_path / "out", "gptq")
    equal(tmp_path / "in", tmp_path / "out")
    settings = open_checkpoint(tmp_path / "out").config.quantization_config
    assert settings["desc_act"] == (name == "gptq act-order")
    lost = "act-order" if name == "gptq act-order" else "zeros"
    with pytest.raises(UnsupportedError, match=rf"{lost}: 32 weights, .*self_attn\.q_proj first"):
        export_checkpoint(tmp_path / "in", tmp_path / "other", "compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_zero_of_0_is_refused_by_name(tmp_path):
    packers.checkpoint(tmp_path / "in", packers.awq, AWQ, symmetric=False, low=0)
    with pytest.raises(UnsupportedError, match=r"zeros below 1: 32 weights, .*q_proj"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_gptqmodels_names_become_the_classic_ones(tmp_path):
    write(tmp_path / "in", "gptq")
    path = tmp_path / "in" / "model.safetensors"
    classic = load_file(path)
    save_file({spellings(name)[1]: tensor for name, tensor in classic.items()}, path)
    export_checkpoint(tmp_path / "in", tmp_path / "out", "gptq")
    (written,) = (tmp_path / "out").glob("*.safetensors")
    again = load_file(written)
    assert again.keys() == classic.keys()
    assert all(torch.equal(again[name], classic[name]) for name in classic)


def test_what_holds_no_integers_is_refused_with_what_to_do(tmp_path, tiny, tiny_nf4):
    with pytest.raises(UnsupportedError, match=r"is not quantized.*qmix quantize"):
        export_checkpoint(tiny, tmp_path / "out", "gptq")
    with pytest.raises(UnsupportedError, match=r"codes of a table \(nf4\).*--requantize"):
        export_checkpoint(tiny_nf4, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_shards_are_cut_and_an_existing_directory_needs_force(tmp_path):
    write(tmp_path / "in", "gptq")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "compressed-tensors", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    with pytest.raises(UsageError, match="OUT exists"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "gptq")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "gptq", force=True)
    equal(tmp_path / "in", tmp_path / "out")


def test_a_damaged_source_leaves_nothing(tmp_path):
    write(tmp_path / "in", "gptq")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{P}.scales"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(QmixError, match=r"w2\.scales: holds NaN"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_command(tmp_path):
    write(tmp_path / "in", "gptq")
    arguments = ["export", tmp_path / "in", tmp_path / "out", "--format"]
    result = qmix(*arguments, "compressed-tensors")
    assert result.returncode == 0, result.stderr
    assert "32 weights, 0 of them rounded" in result.stderr
    equal(tmp_path / "in", tmp_path / "out")
    refused = qmix(*arguments, "exl2")
    assert refused.returncode == 2
    assert "'exl2' is not one of" in refused.stderr
