"""GPTQ's layout: v1 and v2, symmetric or not, act-order or not; and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import gptq
from qmix.formats.layouts.gptq_config import GPTQConfig
from qmix.formats.layouts.tensor_names import gptq_names
from qmix.formats.names import spellings
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scheme import Scheme
from tests.support import packers
from tests.support.packers import IDS, Plain, logits, plain

P = "model.layers.1.block_sparse_moe.experts.3.w2"
FILE = "model-00001-of-00002.safetensors"
CONFIG = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}


def read(tensors, shape, **settings):
    return gptq.unpack(tensors, P, FILE, shape, GPTQConfig(**settings).for_module(P))


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_another_packer_wrote_is_read(bits, group, symmetric, act_order, version):
    shape = (24, 256)
    weight = plain(shape, group, bits=bits, symmetric=symmetric, act_order=act_order)
    tensors = packers.gptq(weight, P, version=version)
    said = {"bits": bits, "symmetric": symmetric, "group_size": group}
    ours = read(tensors, shape, version=version, **said)
    assert ours.bits == bits
    assert ours.shape == shape
    assert ours.dtype == torch.float16
    assert (ours.zeros is None) == symmetric
    assert (ours.perm is None) == (not act_order or group == -1)
    assert ours.group_inputs == (256 if group == -1 else group)
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    # Written again it is the same file, the permutation included.
    same(gptq.pack(ours, P, version), tensors)
    same(gptq.pack(ours, P), packers.gptq(weight, P))


def test_the_bytes_of_a_weight_worked_out_by_hand():
    # Output n, input k has code (n + k) mod 16; outputs 0 to 7 of eight, one group of 32.
    codes = (torch.arange(8)[:, None] + torch.arange(32)) % 16
    scales = torch.arange(1, 9).half()[:, None] / 8
    tensors = gptq.pack(Affine(pack_codes(codes.to(torch.uint8)), scales), P)
    qweight = tensors[f"{P}.qweight"]
    assert qweight.shape == (4, 8)
    assert hex(int(qweight[0, 0])) == "0x76543210"
    assert hex(int(qweight[0, 1]) & 0xFFFFFFFF) == "0x87654321"
    assert hex(int(qweight[1, 7])) == "0x6543210f"
    assert tensors[f"{P}.qzeros"].tolist() == [[0x77777777]]
    assert tensors[f"{P}.scales"].tolist() == [[n / 8 for n in range(1, 9)]]
    assert tensors[f"{P}.g_idx"].tolist() == [0] * 32
    assert read(tensors, (8, 32)).dequantize()[2, 31] == (33 % 16 - 8) * 3 / 8


@pytest.mark.parametrize(
    ("bits", "version", "expected"),
    [(4, 1, 0x77777777), (4, 2, 0x88888888), (8, 1, 0x7F7F7F7F), (8, 2, 0x80808080)],
)
def test_the_words_of_symmetric_zeros(bits, version, expected):
    weight = plain((16, 64), 32, bits=bits)
    tensors = packers.gptq(weight, P, version=version)
    assert tensors[f"{P}.qzeros"].unique().tolist() == [packers.signed(expected)]
    ours = read(tensors, (16, 64), version=version)
    assert ours.zeros is None
    stored = gptq.pack(ours, P, version)[f"{P}.qzeros"]
    assert stored.unique().tolist() == [packers.signed(expected)]


def test_the_bytes_of_an_8_bit_weight_worked_out_by_hand():
    codes = (torch.arange(4)[:, None] + torch.arange(32)).to(torch.uint8)
    tensors = gptq.pack(Affine(codes, torch.full((4, 1), 0.5).half(), bits=8), P)
    qweight = tensors[f"{P}.qweight"]
    assert qweight.shape == (8, 4)
    assert hex(int(qweight[0, 0])) == "0x3020100"
    assert hex(int(qweight[7, 3])) == "0x2221201f"
    assert tensors[f"{P}.qzeros"].tolist() == [[0x7F7F7F7F]]
    assert read(tensors, (4, 32)).dequantize()[3, 31] == (34 - 128) / 2


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
    assert gptq.version_of(ours) == 2
    same(gptq.pack(ours, P, 2), packers.gptq(weight, P, version=2))


@pytest.mark.parametrize("bits", [4, 8])
def test_any_zero_is_read(bits):
    for seed in range(20):
        weight = plain((32, 256), 32, bits=bits, symmetric=False, low=0, seed=seed)
        for version in (1, 2):
            tensors = packers.gptq(weight, P, version=version)
            ours = read(tensors, (32, 256), symmetric=False, version=version)
            assert torch.equal(ours.dequantize(torch.float32), weight.meant())
            same(gptq.pack(ours, P, 2), packers.gptq(weight, P, version=2))


def test_zeros_that_are_all_half_make_a_symmetric_weight():
    for bits in (4, 8):
        tensors = packers.gptq(plain((8, 32), 32, bits=bits), P)
        assert read(tensors, (8, 32), symmetric=False).zeros is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_keep_their_dtype(dtype):
    weight = plain((8, 64), 32, dtype=dtype)
    ours = read(packers.gptq(weight, P), (8, 64))
    assert ours.scales.dtype == ours.dtype == dtype
    assert torch.equal(ours.dequantize(torch.float32), weight.meant())
    same(gptq.pack(ours, P), packers.gptq(weight, P))


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_the_plan_is_what_is_packed(kind, group):
    scheme = Scheme(kind=kind, group_size=group)
    ours = read(packers.gptq(plain((16, 128), group, bits=scheme.bits), P), (16, 128))
    specs = gptq.packed_specs(P, (16, 128), scheme, torch.float16)
    packed = gptq.pack(ours, P)
    assert specs == tuple(TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in packed.items())


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ((12, 128), Scheme(kind="int4")),
        ((10, 128), Scheme(kind="int8")),
        ((16, 12), Scheme(kind="int4", group_size=-1)),
        ((16, 96), Scheme(kind="int8", group_size=64)),
    ],
)
def test_what_fills_no_whole_words_or_groups_is_refused_in_the_plan(shape, scheme):
    with pytest.raises(
        UnsupportedError, match=rf"module {P}: cannot be written as GPTQ.*{shape[0]}"
    ):
        gptq.packed_specs(P, shape, scheme, torch.float16)


def test_names_are_those_of_this_module_only():
    names = [f"{P}.qweight", f"{P}.qzeros", f"{P}.scales", f"{P}.g_idx"]
    others = [f"{P}0.qweight", "model.norm.weight", f"{P}.weight", "lm_head.g_idx"]
    assert list(gptq_names(P, names + others)) == names
    assert list(gptq_names(P, [*names, f"{P}.bias"])) == [*names, f"{P}.bias"]
    assert gptq_names(P, others) == ()
    assert list(gptq_names(P, [f"{P}.g_idx"])) == names  # what there should be


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
        (edited(".qweight", lambda t: t[:12]), r"w2\.qweight: no whole words; expected multiples of 32; found weight \[16, 128\]"),
        (edited(".qweight", lambda t: t[:8]), r"w2\.qzeros: wrong shape; expected \[4, 1\]; found \[4, 2\]"),
        (edited(".qweight", lambda t: t.repeat(2, 1)), r"w2\.qzeros: wrong shape; expected \[4, 4\]; found \[4, 2\]"),
        (edited(".qzeros", lambda t: 0 * t, bits=8), r"w2\.qzeros: not the zeros of a symmetric.*expected 127 in every 8 bits .version 1.; found 0"),
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


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_mixtral_computes_what_its_weights_mean(tmp_path, bits, group, act_order):
    config = {**CONFIG, "bits": bits, "group_size": group, "desc_act": act_order}
    options = {"bits": bits, "group": group, "act_order": act_order}
    model = packers.checkpoint(tmp_path, packers.gptq, config, **options)
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
    (tmp_path / "quantize_config.json").write_text(json.dumps({**settings, "bits": 5}))
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


MIXED = {
    **CONFIG,
    "dynamic": {
        r"+:model\.layers\.1\.(mlp|block_sparse_moe)\.experts\.3\.(w2|down_proj)$": {
            "bits": 8,
            "group_size": 64,
        },
        r".*\.self_attn\.(q|k|v|qkv)_proj": {"bits": 8, "sym": False},
        r"-:.*\.o_proj": {},
    },
}


def own(prefix):
    if prefix == P:
        return {"bits": 8, "group": 64}
    return {"bits": 8, "symmetric": False} if prefix[-6:-5] in "qkv" and "attn" in prefix else {}


def mixed(folder, **changes):
    """A Mixtral as MIXED says, but for `changes` of that."""
    dense = ("gate", "lm_head", "o_proj")
    config = {**MIXED, **changes}
    return packers.checkpoint(folder, packers.gptq, config, own=own, dense=dense)


@pytest.mark.parametrize("dialect", ["classic", "gptqmodel"])
def test_mixed_bits_follow_rules_that_name_modules_as_the_files_do(tmp_path, dialect):
    model = mixed(tmp_path)
    if dialect == "gptqmodel":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {spellings(name)[1]: t for name, t in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5 * expected.abs().max()
    checkpoint = open_checkpoint(tmp_path)
    found = {t.prefix: str(checkpoint.weight(t).scheme) for t in checkpoint.tensors if t.linear}
    assert found[P] == "int8 g64"
    assert found["model.layers.0.self_attn.k_proj"] == "int8 g32 asymmetric"
    assert found["model.layers.0.self_attn.o_proj"] == "16-bit"
    assert found["model.layers.0.block_sparse_moe.experts.1.w2"] == "int4 g32"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 8}, r"config\.json: bits: contradicts.*expected 4, as .*w1 is stored; found 8"),
        ({"dynamic": {}}, r"config\.json: bits: contradicts.*expected 8, as .*q_proj is stored; found 4"),
        (
            {"dynamic": {".*_proj": {"bits": 8, "sym": False}, r".*\.experts\.0": {"bits": 8}}},
            r"config\.json: dynamic: \.\*.*experts.*0: bits: contradicts.*expected 4, as .*w1 is stored; found 8",
        ),
        (
            {"dynamic": {"-:.*": {}}},
            r"config\.json: dynamic: contradicts.*expected no rule that excludes .*q_proj, as .*q_proj is stored; found '-:\.\*'",
        ),
        (
            {"dynamic": {**MIXED["dynamic"], r".*\.w1": {"group_size": 128}}},
            r"config\.json: dynamic: .*w1: group_size: contradicts.*expected 32, as .*w1 is stored; found 128",
        ),
        (
            {"dynamic": {".*_proj": {"bits": 8}, P: {"bits": 8, "group_size": 64}}},
            r"q_proj\.qzeros: not the zeros of a symmetric",
        ),
    ],
)  # fmt: skip
def test_tensors_and_rules_must_not_contradict_each_other(tmp_path, changes, named):
    mixed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=named):
        logits(tmp_path)
