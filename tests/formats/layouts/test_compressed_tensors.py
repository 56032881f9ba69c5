"""compressed-tensors' "pack-quantized" layout: read, written, and equal to GPTQ's weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import compressed_config, compressed_tensors, gptq, tensor_names
from qmix.formats.layouts.gptq_config import GPTQConfig
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine
from qmix.weights.scheme import DENSE, Scheme
from tests.support import packers
from tests.support.models import GOLDEN
from tests.support.packers import IDS, MATRICES, logits, plain, uniform

P = "model.layers.1.block_sparse_moe.experts.3.w2"
FILE = "model-00001-of-00002.safetensors"
SCHEME = Scheme(kind="int4", group_size=32)


def read(tensors, shape=(16, 128)):
    return compressed_tensors.unpack(tensors, P, FILE, shape)


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("shape", [(24, 256), (13, 128)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_another_packer_wrote_is_read(bits, shape, group, symmetric, dtype):
    weight = plain(shape, group, bits=bits, symmetric=symmetric, low=0, dtype=dtype)
    tensors = packers.compressed(weight, P, symmetric=symmetric)
    ours = read(tensors, shape)
    assert ours.bits == bits
    assert ours.shape == shape
    assert ours.dtype == dtype
    assert (ours.zeros is None) == symmetric
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    if symmetric:
        same(compressed_tensors.pack(ours, P), tensors)
    else:
        with pytest.raises(
            UnsupportedError, match=r"cannot be written as compressed-tensors.*zeros"
        ):
            compressed_tensors.pack(ours, P)


@pytest.mark.parametrize(
    "name",
    [
        "grouped",
        "asymmetric",
        "channel",
        "channel_asymmetric",
        "grouped8",
        "asymmetric8",
        "channel8",
    ],
)
def test_what_compressed_tensors_wrote_is_read_to_the_bits_that_it_reads(name):
    stored = load_file(GOLDEN / "compressed-tensors-0.20.0.safetensors")
    expected = stored.pop(f"{name}.expected")
    theirs = {n: t for n, t in stored.items() if n.startswith(f"{name}.")}
    assert set(tensor_names.compressed_names(name, stored.keys())) == set(theirs)
    ours = compressed_tensors.unpack(stored, name, FILE, tuple(expected.shape))
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.dequantize(), expected)
    if ours.zeros is None:
        again = compressed_tensors.pack(ours, name)
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[n], theirs[n]) for n in theirs)


def test_the_words_of_a_weight_worked_out_by_hand():
    # The first input of a row is the lowest four bits; a code is the signed integer plus 8.
    tensors = {
        f"{P}.weight_packed": torch.tensor([[0x76543210] * 4], dtype=torch.int32),
        f"{P}.weight_scale": torch.tensor([[0.5]]).bfloat16(),
        f"{P}.weight_shape": torch.tensor([1, 32]),
    }
    values = [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    assert read(tensors, (1, 32)).dequantize().tolist() == [values * 4]
    tensors[f"{P}.weight_zero_point"] = torch.tensor([[0x00000002]], dtype=torch.int32)  # -6
    values = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert read(tensors, (1, 32)).dequantize().tolist() == [values * 4]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_a_symmetric_gptq_weight_is_the_same_weight(group, bits):
    weight = plain((16, 256), group, bits=bits)
    from_gptq = gptq.unpack(packers.gptq(weight, P), P, FILE, (16, 256), GPTQConfig().for_module(P))
    from_compressed = read(packers.compressed(weight, P), (16, 256))
    same(gptq.pack(from_compressed, P), packers.gptq(weight, P))
    same(compressed_tensors.pack(from_gptq, P), packers.compressed(weight, P))


def test_an_act_order_weight_is_not_written():
    weight = gptq.unpack(
        packers.gptq(plain((16, 128), 32, act_order=True), P),
        P,
        FILE,
        (16, 128),
        GPTQConfig().for_module(P),
    )
    with pytest.raises(UnsupportedError, match="act-order"):
        compressed_tensors.pack(weight, P)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_the_plan_is_what_is_packed(group, kind):
    scheme = Scheme(kind=kind, group_size=group)
    weight = plain((16, 128), group, bits=scheme.bits)
    packed = compressed_tensors.pack(read(packers.compressed(weight, P)), P)
    specs = compressed_tensors.packed_specs(P, (16, 128), scheme, torch.float16)
    assert specs == tuple(TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in packed.items())


def test_names_are_those_of_this_module_only():
    names = [f"{P}.weight_packed", f"{P}.weight_scale", f"{P}.weight_shape"]
    assert (
        list(tensor_names.compressed_names(P, [*names, f"{P}.weight", f"{P}0.weight_packed"]))
        == names
    )
    zeros = f"{P}.weight_zero_point"
    assert list(tensor_names.compressed_names(P, [zeros, *names])) == [*names, zeros]
    assert list(tensor_names.compressed_names(P, [names[1]])) == names  # what there should be
    assert tensor_names.compressed_names(P, [f"{P}.weight"]) == ()


def edited(suffix, edit, shape=(16, 128)):
    tensors = packers.compressed(plain(shape, 32, symmetric=False), P, symmetric=False)
    tensors[P + suffix] = edit(tensors[P + suffix].clone())
    return tensors


def indexed(values):
    tensors = packers.compressed(plain((16, 128), 32), P)
    return {**tensors, f"{P}.weight_g_idx": torch.tensor(values, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (edited(".weight_packed", lambda t: t.byte()), r"w2\.weight_packed: wrong dtype; expected torch.int32; found torch.uint8"),
        (edited(".weight_packed", lambda t: t[:, 1:]), r"w2\.weight_packed: wrong shape; expected \[16, 128 codes of 4 or 8 bits\]; found \[16, 15\]"),
        (edited(".weight_packed", lambda t: t[:, :12]), r"w2\.weight_packed: .*4 or 8 bits only; expected 4 or 8 bits; found 3 bits"),
        (edited(".weight_packed", lambda t: t.repeat(1, 2)), r"w2\.weight_zero_point: wrong shape; expected \[4, 4\]; found \[2, 4\]"),
        (edited(".weight_shape", lambda t: t.flip(0)), r"w2\.weight_shape: not the shape.*expected \[16, 128\]; found \[128, 16\]"),
        (edited(".weight_shape", lambda t: t.int()), r"w2\.weight_shape: wrong dtype"),
        (edited(".weight_scale", lambda t: t.T), r"w2\.weight_scale: wrong shape; expected \[16, groups\]; found \[4, 16\]"),
        (edited(".weight_scale", lambda t: t[:, :3]), r"w2\.weight_scale: unknown group size.*found 3 groups of 128"),
        (edited(".weight_scale", lambda t: t * torch.inf), r"w2\.weight_scale: holds NaN or infinity"),
        (edited(".weight_scale", lambda t: t.double()), r"w2\.weight_scale: wrong dtype"),
        (edited(".weight_zero_point", lambda t: t[:1]), r"w2\.weight_zero_point: wrong shape; expected \[2, 4\]; found \[1, 4\]"),
        (edited(".weight_zero_point", lambda t: t.to(torch.int8)), r"w2\.weight_zero_point: wrong dtype"),
        (indexed([3] * 32 + [0] * 32 + [1] * 32 + [2] * 32), r"w2\.weight_g_idx: inputs scattered"),
        (indexed([-1] * 128), r"w2\.weight_g_idx: group index out of range; expected 0 to 3; found -1"),
    ],
)  # fmt: skip
def test_a_damaged_weight_is_refused_by_name(tensors, named):
    with pytest.raises(QmixError, match=named) as caught:
        read(tensors)
    assert str(caught.value).startswith(FILE)
    assert caught.value.exit_code == 3


def test_a_trivial_g_idx_is_accepted():
    assert read(indexed([i // 32 for i in range(128)])).perm is None


@pytest.mark.parametrize("suffix", [".weight_packed", ".weight_scale", ".weight_shape"])
def test_a_missing_tensor_is_named(tmp_path, suffix):
    tensors = packers.compressed(plain((16, 128), 32), P)
    del tensors[P + suffix]
    with pytest.raises(CheckpointError, match=rf"w2\{suffix}: missing"):
        read(tensors)
    packers.checkpoint(tmp_path, packers.compressed, None)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[P + suffix]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=rf"1 missing, 0 left over; expected each tensor of config.json's model once; found missing {P}{suffix}",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}, "mxfp6-pack-quantized format is not read"),
        ({"quant_method": "compressed-tensors", "format": ["pack-quantized"]}, "format"),
        ({"quant_method": "gptq"}, "quant_method names another.*found 'gptq'"),
        ({}, "quant_method"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(document, named):
    with pytest.raises(QmixError, match=named):
        compressed_config.read(document, "config.json")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_mixtral_computes_what_its_weights_mean(tmp_path, symmetric):
    def pack(weight, prefix):
        return packers.compressed(weight, prefix, symmetric=symmetric)

    config = compressed_tensors.quantization_config(uniform(SCHEME))
    config["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    model = packers.checkpoint(tmp_path, pack, config, symmetric=symmetric, low=0)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5 * expected.abs().max()


def weights(bits, size):
    strategy = {"strategy": "group", "group_size": size} if size != -1 else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": True, **strategy}


def test_the_settings_written():
    config = compressed_tensors.quantization_config(uniform(SCHEME))
    compressed_config.read(config, "config.json")
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights(4, 32)}},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    whole = compressed_tensors.quantization_config(
        uniform(Scheme(kind="int8", group_size=-1), attention=DENSE)
    )
    assert whole["config_groups"]["group_0"]["weights"] == weights(8, -1)
    assert whole["ignore"] == ["lm_head", "re:.*gate$", r"re:model\.layers\.\d+\.self_attn\..*"]


def test_mixed_schemes_are_groups_of_named_modules():
    groups = compressed_tensors.quantization_config(uniform(SCHEME, attention=Scheme(kind="int8")))[
        "config_groups"
    ]
    attention = r"re:model\.layers\.\d+\.self_attn\..*"
    assert groups == {
        "group_0": {"targets": ["Linear"], "weights": weights(4, 32)},
        "group_1": {"targets": [attention], "weights": weights(8, 128)},
    }


def test_where_experts_differ_all_are_named_and_8_bits_come_first():
    # Or transformers 5.23, which takes one group for all experts, would read 8 bits as 4 unnoticed.
    layer = {name: SCHEME for name in MATRICES if name.startswith("model.layers.1.")}
    groups = compressed_tensors.quantization_config(uniform(Scheme(kind="int8")) | layer)[
        "config_groups"
    ]
    experts = r"(block_sparse_moe|mlp)\.experts(\..*)?$"
    assert groups == {
        "group_0": {
            "targets": [
                r"re:model\.layers\.\d+\.self_attn\..*",
                rf"re:model\.layers\.(0|2)\.{experts}",
            ],
            "weights": weights(8, 128),
        },
        "group_1": {"targets": [rf"re:model\.layers\.1\.{experts}"], "weights": weights(4, 32)},
    }


def test_a_weight_has_one_meaning_in_all_layouts():
    weight = plain((16, 128), 32, symmetric=False, low=0)
    layouts = [
        read(packers.compressed(weight, P, symmetric=False)),
        gptq.unpack(
            packers.gptq(weight, P), P, FILE, (16, 128), GPTQConfig(symmetric=False).for_module(P)
        ),
    ]
    for ours in layouts:
        assert (type(ours), ours.bits) == (Affine, 4)
        assert torch.equal(ours.codes, layouts[0].codes)
        assert torch.equal(ours.zeros, layouts[0].zeros)
        assert torch.equal(ours.scales, layouts[0].scales)
