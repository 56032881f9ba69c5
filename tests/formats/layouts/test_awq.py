"""AWQ's "gemm" layout: read, and its other versions refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import awq, awq_config, gptq, tensor_names
from qmix.formats.layouts.gptq_config import GPTQConfig
from tests.support import packers
from tests.support.packers import IDS, logits, plain

P = "model.layers.1.block_sparse_moe.experts.3.w2"
FILE = "model-00001-of-00002.safetensors"
CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}


def read(tensors, shape=(16, 128)):
    return awq.unpack(tensors, P, FILE, shape)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("shape", [(24, 256), (2056, 128)], ids=str)
def test_what_another_packer_wrote_is_read(shape, group, symmetric):
    weight = plain(shape, group, symmetric=symmetric, low=0)
    ours = read(packers.awq(weight, P), shape)
    assert ours.shape == shape
    assert ours.perm is None
    assert (ours.zeros is None) == symmetric
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    assert torch.equal(ours.dequantize(), weight.meant().half())


def test_the_words_of_a_weight_worked_out_by_hand():
    # Word 0 of input k holds, from its lowest four bits on, the outputs 0 2 4 6 1 3 5 7.
    qweight = torch.tensor([[0x75316420]] * 32, dtype=torch.int32)
    qzeros = torch.tensor([[0x00000081]], dtype=torch.int32)  # outputs 0 and 2 have zeros 1 and 8
    scales = torch.full((1, 8), 0.5).half()
    tensors = {f"{P}.qweight": qweight, f"{P}.qzeros": qzeros, f"{P}.scales": scales}
    values = read(tensors, (8, 32)).dequantize()
    assert values[:, 31].tolist() == [-0.5, 0.5, -3.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def test_awq_to_gptq_is_exact_unless_a_zero_is_0():
    weight = plain((16, 128), 32, symmetric=False)
    ours = read(packers.awq(weight, P))
    again = gptq.unpack(
        gptq.pack(ours, P), P, FILE, (16, 128), GPTQConfig(symmetric=False).for_module(P)
    )
    assert torch.equal(again.dequantize(), ours.dequantize())
    with pytest.raises(UnsupportedError, match="zero of 0"):
        gptq.pack(read(packers.awq(plain((64, 128), 32, symmetric=False, low=0), P), (64, 128)), P)


def test_names_are_those_of_awq():
    names = [f"{P}.qweight", f"{P}.qzeros", f"{P}.scales"]
    assert list(tensor_names.awq_names(P, [*names, f"{P}.weight", f"{P}0.qweight"])) == names
    assert list(tensor_names.awq_names(P, [f"{P}.qweight"])) == names  # what there should be
    assert tensor_names.awq_names(P, [*names, f"{P}.g_idx"]) == ()
    assert tensor_names.awq_names(P, [f"{P}.weight"]) == ()


def edited(suffix, edit):
    tensors = packers.awq(plain((16, 128), 32, symmetric=False), P)
    tensors[P + suffix] = edit(tensors[P + suffix].clone())
    return tensors


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (edited(".qweight", lambda t: t.short()), r"w2\.qweight: wrong dtype; expected torch.int32; found torch.int16"),
        (edited(".qweight", lambda t: t[:-8]), r"w2\.qweight: wrong shape; expected \[128, 2\]; found \[120, 2\]"),
        (edited(".qweight", lambda t: t.T), r"w2\.qweight: wrong shape"),
        (edited(".qzeros", lambda t: t[:2]), r"w2\.qzeros: wrong shape; expected \[4, 2\]; found \[2, 2\]"),
        (edited(".scales", lambda t: t[:, :8]), r"w2\.scales: wrong shape; expected \[groups, 16\]; found \[4, 8\]"),
        (edited(".scales", lambda t: t.int()), r"w2\.scales: wrong dtype"),
        (edited(".scales", lambda t: t / 0), r"w2\.scales: holds NaN or infinity"),
        (edited(".scales", lambda t: t.repeat(4, 1)), r"w2\.scales: unknown group size; expected 32, 64, 128.*16 groups of 128"),
    ],
)  # fmt: skip
def test_a_damaged_weight_is_refused_by_name(tensors, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        read(tensors)
    assert str(caught.value).startswith(FILE)


@pytest.mark.parametrize("suffix", [".qweight", ".qzeros", ".scales"])
def test_a_missing_tensor_is_named(suffix):
    tensors = packers.awq(plain((16, 128), 32), P)
    del tensors[P + suffix]
    with pytest.raises(CheckpointError, match=rf"w2\{suffix}: missing"):
        read(tensors)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "AWQ in the gemv version.*expected gemm"),
        ({"version": "GEMV_FAST", "w_bit": 4}, "GEMV_FAST"),
        ({"version": "marlin"}, "marlin"),
        ({"version": 2}, "version"),
        ({"version": "GEMM", "w_bit": 3}, "4 bits only.*found 3"),
        ({"bits": 8}, "4 bits only"),
        ({"quant_method": "gptq"}, "quant_method names another.*found 'gptq'"),
    ],
)
def test_other_settings_are_refused(document, named):
    with pytest.raises(QmixError, match=named):
        awq_config.read(document, "config.json")


def test_the_settings_that_files_have():
    for document in (None, CONFIG, {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, {}):
        awq_config.read(document, "config.json")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_mixtral_computes_what_its_weights_mean(tmp_path, symmetric):
    model = packers.checkpoint(tmp_path, packers.awq, CONFIG, symmetric=symmetric, low=0)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5 * expected.abs().max()
    checkpoint = open_checkpoint(tmp_path)
    (tensor,) = (t for t in checkpoint.tensors if t.prefix == P)
    assert checkpoint.packing(tensor).layout == "AWQ"


def test_the_settings_may_lie_beside_the_config(tmp_path):
    packers.checkpoint(tmp_path, packers.awq, None)
    assert logits(tmp_path).isfinite().all()
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "version": "GEMV"}))
    with pytest.raises(
        UnsupportedError, match=r"quant_config\.json: version: AWQ in the GEMV version"
    ):
        logits(tmp_path)


def test_a_gemv_file_is_refused_by_that_name(tmp_path):
    def gemv(weight, prefix):  # packed along the inputs, [N, K / 8]
        rows = [
            [packers.word(row[k : k + 8]) for k in range(0, len(row), 8)] for row in weight.codes
        ]
        tensors = packers.awq(weight, prefix)
        return {**tensors, f"{prefix}.qweight": torch.tensor(rows, dtype=torch.int32)}

    packers.checkpoint(tmp_path, gemv, {**CONFIG, "version": "gemv"})
    with pytest.raises(UnsupportedError, match="gemv"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".qweight", ".qzeros", ".scales"])
def test_a_missing_expert_tensor_is_refused_before_any_data_is_read(tmp_path, suffix):
    packers.checkpoint(tmp_path, packers.awq, CONFIG)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[P + suffix]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing {P}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_what_is_written_is_what_another_packer_writes(group, symmetric):
    weight = plain((24, 256), group, symmetric=symmetric, low=0)
    theirs = packers.awq(weight, P)
    affine = read(theirs, (24, 256))
    ours = awq.pack(affine, P)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for spec in awq.packed_specs(P, (24, 256), affine.scheme, torch.float16):
        assert (spec.dtype, spec.shape) == (ours[spec.name].dtype, ours[spec.name].shape)
