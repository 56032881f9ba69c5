"""GPTQ's layout: v1 and v2, symmetric or not, act-order or not; and nothing else."""

import json

import packers
import pytest
import torch
from packers import Plain, plain
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import gptq, open_checkpoint
from qmix.heads import MixtralForCausalLM
from qmix.int4 import Int4, pack_codes
from qmix.scheme import Scheme

P = "model.layers.1.block_sparse_moe.experts.3.w2"
FILE = "model-00001-of-00002.safetensors"
CONFIG = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}


def read(tensors, shape, **settings):
    return gptq.unpack(tensors, P, FILE, shape, gptq.Settings(**settings))


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_what_another_packer_wrote_is_read(group, symmetric, act_order, version):
    shape = (24, 256)
    weight = plain(shape, group, symmetric=symmetric, act_order=act_order)
    tensors = packers.gptq(weight, P, version=version)
    ours = read(tensors, shape, version=version, symmetric=symmetric, group_size=group)
    assert ours.shape == shape
    assert ours.dtype == torch.float16
    assert (ours.zeros is None) == symmetric
    assert (ours.perm is None) == (not act_order or group == -1)
    assert ours.group_inputs == (256 if group == -1 else group)
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    # Written again it is the same file, the permutation included.
    same(gptq.pack(ours, P), packers.gptq(weight, P))


def test_the_bytes_of_a_weight_worked_out_by_hand():
    # Output n, input k has code (n + k) mod 16; outputs 0 to 7 of eight, one group of 32.
    codes = (torch.arange(8)[:, None] + torch.arange(32)) % 16
    scales = torch.arange(1, 9).half()[:, None] / 8
    tensors = gptq.pack(Int4(pack_codes(codes.to(torch.uint8)), scales), P)
    qweight = tensors[f"{P}.qweight"]
    assert qweight.shape == (4, 8)
    assert hex(int(qweight[0, 0])) == "0x76543210"
    assert hex(int(qweight[0, 1]) & 0xFFFFFFFF) == "0x87654321"
    assert hex(int(qweight[1, 7])) == "0x6543210f"
    assert tensors[f"{P}.qzeros"].tolist() == [[0x77777777]]
    assert tensors[f"{P}.scales"].tolist() == [[n / 8 for n in range(1, 9)]]
    assert tensors[f"{P}.g_idx"].tolist() == [0] * 32
    assert read(tensors, (8, 32)).dequantize()[2, 31] == (33 % 16 - 8) * 3 / 8


def test_the_words_of_symmetric_zeros():
    weight = plain((16, 64), 32)
    for version, expected in ((1, 0x77777777), (2, packers.signed(0x88888888))):
        stored = packers.gptq(weight, P, version=version)[f"{P}.qzeros"]
        assert stored.unique().tolist() == [expected]
        assert (
            read(packers.gptq(weight, P, version=version), (16, 64), version=version).zeros is None
        )
    ours = read(packers.gptq(weight, P), (16, 64))
    assert gptq.pack(ours, P)[f"{P}.qzeros"].unique().tolist() == [0x77777777]


def test_a_zero_of_0_was_stored_by_borrowing():
    zeros = [[0], [3], [0], [0], [15], [1], [0], [0]]
    weight = Plain(plain((8, 32), 32).codes, zeros, [0] * 32, plain((8, 32), 32).scales)
    tensors = packers.gptq(weight, P)
    # 00 1f 03 00 .. - 11111111: nibbles below the zero are lent from the ones above.
    assert tensors[f"{P}.qzeros"].item() == packers.signed(0x001F0030 - 0x11111111)
    ours = read(tensors, (8, 32), symmetric=False)
    assert ours.zeros.flatten().tolist() == [0, 3, 0, 0, 15, 1, 0, 0]
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    with pytest.raises(UnsupportedError, match="cannot store a zero of 0"):
        gptq.pack(ours, P)
    for seed in range(20):
        weight = plain((16, 64), 32, symmetric=False, low=0, seed=seed)
        ours = read(packers.gptq(weight, P), (16, 64), symmetric=False)
        assert torch.equal(ours.dequantize(torch.float32), weight.meant())


def test_zeros_that_are_all_8_make_a_symmetric_weight():
    assert read(packers.gptq(plain((8, 32), 32), P), (8, 32), symmetric=False).zeros is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_keep_their_dtype(dtype):
    weight = plain((8, 64), 32, dtype=dtype)
    ours = read(packers.gptq(weight, P), (8, 64))
    assert ours.scales.dtype == ours.dtype == dtype
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    same(gptq.pack(ours, P), packers.gptq(weight, P))


def test_the_plan_is_what_is_packed():
    for group in (-1, 32, 128):
        ours = read(packers.gptq(plain((16, 128), group), P), (16, 128))
        specs = gptq.packed_specs(
            P, (16, 128), Scheme(kind="int4", group_size=group), torch.float16
        )
        packed = gptq.pack(ours, P)
        assert specs == {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()}
        assert list(specs) == list(packed)


def test_members_are_this_modules_tensors_only():
    names = [f"{P}.qweight", f"{P}.qzeros", f"{P}.scales", f"{P}.g_idx"]
    others = [f"{P}0.qweight", "model.norm.weight", f"{P}.weight", "lm_head.g_idx"]
    assert list(gptq.members(P, names + others)) == names
    assert list(gptq.members(P, [*names, f"{P}.bias"])) == [*names, f"{P}.bias"]
    assert gptq.members(P, others) == ()
    assert list(gptq.members(P, [f"{P}.g_idx"])) == names  # what there should be


def edited(suffix, edit, **options):
    tensors = packers.gptq(plain((16, 128), 32, **options), P)
    tensors[P + suffix] = edit(tensors[P + suffix].clone())
    return tensors


def put(index, value):
    def edit(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return edit


def stray_bias(value):
    tensors = packers.gptq(plain((16, 128), 32), P)
    return {**tensors, f"{P}.bias": torch.full((16,), value, dtype=torch.float16)}


def test_a_bias_of_zeros_is_accepted():
    weight = plain((16, 128), 32)
    assert torch.equal(read(stray_bias(0.0), (16, 128)).dequantize(torch.float32), weight.meant())


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (edited(".qweight", lambda t: t.long()), r"w2\.qweight: wrong dtype; expected torch.int32; found torch.int64"),
        (edited(".qweight", lambda t: t.float()), r"w2\.qweight: wrong dtype"),
        (edited(".qweight", lambda t: t[:-1]), r"w2\.qweight: wrong shape; expected \[16, 16\]; found \[15, 16\]"),
        (edited(".qweight", lambda t: t.repeat(2, 1)), r"w2\.qweight: GPTQ is read in 4 bits only; expected 4; found 8 bits"),
        (edited(".qweight", lambda t: t[:12]), r"w2\.qweight: GPTQ is read in 4 bits only; expected 4; found 3 bits"),
        (edited(".qzeros", lambda t: t[:1]), r"w2\.qzeros: wrong shape; expected \[4, 2\]; found \[1, 2\]"),
        (edited(".qzeros", put(3, packers.signed(0x88888888))), r"w2\.qzeros: not the zeros of a symmetric.*expected 7.*version 1.*found 8.*checkpoint_format"),
        (edited(".qzeros", put(3, 0x77777377)), r"w2\.qzeros: not the zeros of a symmetric.*found 3"),
        (edited(".scales", lambda t: t.double()), r"w2\.scales: wrong dtype; expected float16, bfloat16 or float32; found torch.float64"),
        (edited(".scales", lambda t: t.T), r"w2\.scales: wrong shape; expected \[groups, 16\]; found \[16, 4\]"),
        (edited(".scales", lambda t: t[:3]), r"w2\.scales: unknown group size; expected 32, 64, 128 inputs or all.*found 3 groups of 128"),
        (edited(".scales", lambda t: t.repeat(2, 1)), r"w2\.scales: unknown group size.*found 8 groups of 128"),
        (edited(".scales", lambda t: t[:0]), r"w2\.scales: unknown group size.*found 0 groups"),
        (edited(".scales", put(5, float("nan"))), r"w2\.scales: holds NaN or infinity"),
        (edited(".scales", put(5, float("-inf"))), r"w2\.scales: holds NaN or infinity"),
        (edited(".g_idx", lambda t: t.long()), r"w2\.g_idx: wrong dtype"),
        (edited(".g_idx", lambda t: t[:-1]), r"w2\.g_idx: wrong shape; expected \[128\]; found \[127\]"),
        (edited(".g_idx", put(7, -1)), r"w2\.g_idx: group index out of range; expected 0 to 3; found -1"),
        (edited(".g_idx", put(7, 4)), r"w2\.g_idx: group index out of range; expected 0 to 3; found 4"),
        (edited(".g_idx", put(7, 2**31 - 1)), r"w2\.g_idx: group index out of range"),
        (edited(".g_idx", put(7, 1)), r"w2\.g_idx: groups of unequal size; expected 32 inputs in each of 4 groups; found 31 inputs in group 0"),
        (edited(".g_idx", lambda t: 0 * t), r"w2\.g_idx: groups of unequal size.*found 128 inputs in group 0"),
        (stray_bias(0.5), r"w2\.bias: a Mixtral has no biases; expected zeros; found 0.5"),
    ],
)  # fmt: skip
def test_a_damaged_weight_is_refused_by_name(tensors, named):
    with pytest.raises(QmixError, match=named) as caught:
        read(tensors, (16, 128))
    assert str(caught.value).startswith(FILE)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", [".qweight", ".qzeros", ".scales", ".g_idx"])
def test_a_missing_tensor_is_named(suffix):
    tensors = packers.gptq(plain((16, 128), 32), P)
    del tensors[P + suffix]
    with pytest.raises(CheckpointError, match=rf"w2\{suffix}: missing"):
        read(tensors, (16, 128))


def test_a_shape_that_is_not_the_models_is_refused():
    tensors = packers.gptq(plain((16, 128), 32), P)
    for shape in ((16, 64), (32, 128), (128, 16), (12, 128), (16, 100)):
        with pytest.raises(CheckpointError, match=FILE):
            read(tensors, shape)


def test_the_declared_group_size_must_be_that_of_the_scales():
    tensors = packers.gptq(plain((16, 128), 32), P)
    with pytest.raises(
        CheckpointError, match=r"scales: not the group size of a/config\.json.*64.*4 groups"
    ):
        read(tensors, (16, 128), group_size=64, where="a/config.json")  # fmt: skip


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, (1, True, None)),
        ({}, (1, True, None)),
        ({"bits": [4], "group_size": [128], "sym": [True], "desc_act": [True]}, (1, True, 128)),
        ({"bits": 4, "group_size": -1, "sym": False}, (1, False, -1)),
        ({"checkpoint_format": "gptq_v2", "bits": 4}, (2, True, None)),
        ({"checkpoint_format": "gptq", "format": "gptq", "quant_method": "gptq"}, (1, True, None)),
        ({"group_size": 128, "dynamic": {"-:.*gate": {}}}, (1, True, None)),
        ({"group_size": 128, "dynamic": {}}, (1, True, 128)),
        ({"checkpoint_format": None, "format": "gptq_v2"}, (2, True, None)),
        ({"is_marlin_format": False, "model_name_or_path": None}, (1, True, None)),
    ],
)
def test_the_settings_that_files_have(document, expected):
    found = gptq.settings(document, "x.json")
    assert (found.version, found.symmetric, found.group_size) == expected


@pytest.mark.parametrize(
    ("document", "kind", "named"),
    [
        ({"bits": 8}, UnsupportedError, "bits.*4 bits only.*found 8"),
        ({"bits": "4"}, UnsupportedError, "bits"),
        ({"bits": True}, UnsupportedError, "bits"),
        ({"bits": [4, 8]}, UnsupportedError, "bits"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin format"),
        ({"checkpoint_format": 2}, UnsupportedError, "in the 2 format is not read; expected gptq or gptq_v2"),
        ({"is_marlin_format": True}, UnsupportedError, "marlin"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, CheckpointError, "differ"),
        ({"quant_method": "awq"}, CheckpointError, "quant_method.*expected 'gptq'; found 'awq'"),
        ({"group_size": 48}, CheckpointError, "group_size: unknown group size.*-1 or one of 32, 64, 128; found 48"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"group_size": 128.0}, CheckpointError, "group_size"),
        ({"sym": 1}, CheckpointError, "sym.*true or false"),
    ],
)  # fmt: skip
def test_settings_that_are_not_read_are_refused(document, kind, named):
    with pytest.raises(kind, match=named) as caught:
        gptq.settings(document, "x.json")
    assert str(caught.value).startswith("x.json")


IDS = torch.tensor([[5, 6, 7, 99, 3]])


def logits(folder):
    with torch.no_grad():
        return MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")(
            input_ids=IDS
        ).logits


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_a_mixtral_computes_what_its_weights_mean(tmp_path, group, act_order):
    config = {**CONFIG, "group_size": group, "desc_act": act_order}
    model = packers.checkpoint(tmp_path, packers.gptq, config, group=group, act_order=act_order)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5 * expected.abs().max()
    checkpoint = open_checkpoint(tmp_path)
    dense = model.state_dict()
    for tensor in checkpoint.tensors:
        if tensor.linear:
            weight = checkpoint.weight(tensor)
            assert torch.equal(weight.dequantize(torch.float32), dense[tensor.name])
            assert checkpoint.packed(tensor) == (tensor.kind in ("attention", "expert"))


def test_an_asymmetric_mixtral_with_a_packed_router_and_head(tmp_path):
    model = packers.checkpoint(
        tmp_path,
        packers.gptq,
        {**CONFIG, "sym": False},
        experts=8,
        dense=("none",),
        symmetric=False,
        low=0,
    )
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gptqmodels_names_and_both_places_of_the_settings(tmp_path):
    packers.checkpoint(tmp_path, packers.gptq, CONFIG)
    expected = logits(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    def theirs(name):
        name = name.replace("block_sparse_moe", "mlp")
        for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{old}.", f".{new}.")
        return name

    save_file(
        {theirs(n): t for n, t in tensors.items()}, tmp_path / "gptq_model-4bit-32g.safetensors"
    )
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits(tmp_path), expected)
    document = json.loads((tmp_path / "config.json").read_text())
    settings = document.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert torch.equal(logits(tmp_path), expected)  # v1 and symmetric are what is missing
    (tmp_path / "quantize_config.json").write_text(json.dumps({**settings, "group_size": [32]}))
    assert torch.equal(logits(tmp_path), expected)
    (tmp_path / "quantize_config.json").write_text(json.dumps({**settings, "bits": 3}))
    with pytest.raises(UnsupportedError, match=r"quantize_config\.json: bits"):
        logits(tmp_path)


def test_v2_declared_as_v1_is_refused_and_not_read_as_noise(tmp_path):
    def v2(weight, prefix):
        return packers.gptq(weight, prefix, version=2)

    packers.checkpoint(tmp_path, v2, CONFIG)
    with pytest.raises(CheckpointError, match="qzeros: not the zeros of a symmetric weight"):
        logits(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert logits(tmp_path).isfinite().all()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(P)], f"missing {P}.weight"),
        (lambda t: t.pop(f"{P}.g_idx"), f"1 missing.*missing {P}.g_idx"),
        (lambda t: t.pop(f"{P}.qweight"), f"1 missing.*missing {P}.qweight"),
        (lambda t: t.pop(f"{P}.scales"), f"1 missing.*missing {P}.scales"),
        (lambda t: t.update({f"{P}.weight": torch.zeros(64, 128)}), f"1 left over.*left over {P}.weight"),
        (lambda t: t.update({f"{P}.wf": torch.zeros(1)}), f"left over {P}.wf"),
        (lambda t: t.update({P.replace("3.w2", "4.w2") + ".qweight": torch.zeros(1)}), r"left over .*experts\.4\.w2\.qweight"),
        (lambda t: t.update({"model.norm.qweight": torch.zeros(1)}), r"left over model\.norm\.qweight"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_set_is_refused_before_any_data_is_read(tmp_path, edit, named):
    packers.checkpoint(tmp_path, packers.gptq, CONFIG)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path)


def test_a_stale_config_does_not_make_dense_weights_packed(tmp_path):
    packers.checkpoint(tmp_path, lambda w, p: {f"{p}.weight": w.meant()}, {**CONFIG, "bits": 3})
    assert logits(tmp_path).isfinite().all()


def test_the_settings_written_are_those_that_vllm_demands():
    config = gptq.config(Scheme(kind="int4"), attention=True)
    assert config == {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "dynamic": {}, "group_size": 128,
        "lm_head": False, "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    assert gptq.settings(config, "x").group_size == 128
    (rule,) = gptq.config(Scheme(kind="int4"), attention=False)["dynamic"]
    assert rule.startswith("-:")  # gptqmodel's mark of modules that stay dense
