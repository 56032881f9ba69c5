"""bitsandbytes' layout: it reads what we write, we read what it writes, and nothing else."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError
from qmix.formats.layouts import bnb, tensor_names
from qmix.weights import nf4
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import NF4, NF4_BLOCK_SIZES, Scheme
from tests.support.oracles import eager_bitsandbytes

bitsandbytes = eager_bitsandbytes()
functional = bitsandbytes.functional

P = "model.layers.0.block_sparse_moe.experts.3.w1"
Q = "model.layers.0.self_attn.q_proj"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scheme(block=64, double=True):
    return Scheme(kind="nf4", block_size=block, double_quant=double)


def equal(a, b):
    """The same tensors under the same names in the same order, bit for bit."""
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def their_layer(weight, double=True, storage=torch.uint8):
    """A Linear4bit of theirs, quantized by them."""
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=storage,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=storage,
        module=layer,
    )
    return layer.to("cpu")


def their_dequantized(tensors, prefix):
    """What bitsandbytes makes of a file's tensors."""
    start = f"{prefix}.weight."
    state = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    quant_state = functional.QuantState.from_dict(state, torch.device("cpu"))
    return functional.dequantize_4bit(tensors[f"{prefix}.weight"], quant_state)


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_we_pack_is_what_their_layer_saves(dtype, double):
    weight = random(96, 256).to(dtype)
    theirs = {f"{P}.{n}": t for n, t in their_layer(weight, double).state_dict().items()}
    equal(bnb.pack(nf4.quantize(weight, scheme(double=double)), P), theirs)


@pytest.mark.parametrize("block", NF4_BLOCK_SIZES)
def test_the_blob_is_theirs_to_the_byte(block):
    weight = random(64, 512).half()
    for double in (True, False):
        _, state = functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        theirs = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
        ours = bnb.pack(nf4.quantize(weight, scheme(block, double)), P)[P + bnb.STATE_NF4]
        assert bytes(ours.tolist()) == bytes(theirs.tolist())


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_of_ours_is_dequantized_by_them_to_the_same_tensors(tmp_path, dtype, double):
    weights = {P: random(128, 512).to(dtype), Q: random(64, 256, 1).to(dtype)}
    weights[Q][5] = 0
    packed = {name: nf4.quantize(w, scheme(double=double)) for name, w in weights.items()}
    tensors = {}
    for name, weight in packed.items():
        tensors |= bnb.pack(weight, name)
    save_file(tensors, tmp_path / "model.safetensors")
    read = load_file(tmp_path / "model.safetensors")
    for name, weight in packed.items():
        theirs = their_dequantized(read, name)
        assert theirs.dtype == dtype
        assert torch.equal(theirs, weight.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
def test_a_checkpoint_of_theirs_is_read(tmp_path, double, storage):
    weight = random(128, 512).bfloat16()
    layer = their_layer(weight, double, storage)
    save_file({f"{Q}.{n}": t for n, t in layer.state_dict().items()}, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert read[f"{Q}.weight"].dtype == storage
    assert tensor_names.bnb_names(Q, read.keys())[0] == f"{Q}.weight"
    assert set(tensor_names.bnb_names(Q, read.keys())) == set(read)
    ours = bnb.unpack(read, Q, "a.safetensors")
    assert ours.dtype == torch.bfloat16
    assert torch.equal(
        ours.dequantize(), functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    )
    equal(bnb.pack(ours, Q), bnb.pack(nf4.quantize(weight, scheme(double=double)), Q))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    block=st.sampled_from(NF4_BLOCK_SIZES),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 4),
)
def test_unpacking_undoes_packing_and_the_plan_bounds_it(
    rows, columns, block, double, dtype, exponent
):
    chosen = scheme(block, double)
    weight = nf4.quantize((random(rows, columns) * 10.0**exponent).to(dtype), chosen)
    tensors = bnb.pack(weight, P)
    again = bnb.unpack(tensors, P, "file")
    equal(bnb.pack(again, P), tensors)
    assert again.scheme == chosen
    assert torch.equal(again.dequantize(), weight.dequantize())
    specs = bnb.packed_specs(P, (rows, columns), chosen, dtype)
    assert [spec.name for spec in specs] == list(tensors)
    for spec in specs:
        tensor = tensors[spec.name]
        assert spec.dtype == tensor.dtype
        if spec.name.endswith("bitsandbytes__nf4"):
            assert tensor.numel() <= spec.shape[0] <= tensor.numel() + 24
        else:
            assert spec.shape == tensor.shape


def test_the_plan_bounds_a_blob_with_the_longest_offset():
    weight = nf4.quantize(random(4, 64))
    smallest = torch.finfo(torch.float32).smallest_normal
    weight = replace(weight, scales=replace(weight.scales, offset=-smallest))
    state = bnb.pack(weight, P)[P + bnb.STATE_NF4]
    spec = bnb.packed_specs(P, (4, 64), NF4, torch.float32)[-1]
    assert (spec.name, spec.shape) == (P + bnb.STATE_NF4, tuple(state.shape))


def test_names_are_those_of_this_module_only():
    names = list(bnb.pack(nf4.quantize(random(2, 64)), P))
    others = ["model.norm.weight", f"{Q}.weight", f"{P}0.weight.absmax", f"{P}.weight.g_idx"]
    assert tensor_names.bnb_names(P, names + others) == tuple(names)
    assert tensor_names.bnb_names(Q, names + others) == ()
    assert tensor_names.bnb_names(P, [*others, f"{P}.weight"]) == ()
    assert tensor_names.bnb_names(P, [f"{P}.weight.absmax"]) == (f"{P}.weight.absmax",)


def test_the_config_names_what_stays_dense():
    config = bnb.quantization_config(NF4, torch.bfloat16)
    assert config["llm_int8_skip_modules"] == ["lm_head", "gate"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"] is True
    assert json.loads(json.dumps(config)) == config
    dense = ("lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj")
    plain = bnb.quantization_config(scheme(double=False), torch.float16, dense)
    assert plain["bnb_4bit_use_double_quant"] is False
    assert plain["llm_int8_skip_modules"] == [
        *("lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj")
    ]


def test_dtypes_may_be_spelled_with_their_module():
    tensors = changed_state(dtype="torch.bfloat16", nested_dtype="torch.float32")
    assert bnb.unpack(tensors, P, "file").dtype == torch.bfloat16


def test_an_offset_is_rounded_to_the_float32_that_it_means():
    unpacked = bnb.unpack(changed_state(nested_offset=0.1), P, "file")
    assert isinstance(unpacked.scales, NestedScales)
    assert unpacked.scales.offset == torch.tensor(0.1).item() != 0.1
    assert bnb.unpack(changed_state(nested_offset=0), P, "file").scales.offset == 0.0


def good(double=True):
    """A sound 12 x 64 weight in 32-element blocks: 24 of them."""
    return bnb.pack(nf4.quantize(random(12, 64).bfloat16(), scheme(32, double)), P)


def changed(name, tensor, double=True):
    tensors = good(double)
    if tensor is None:
        del tensors[P + name]
    else:
        tensors[P + name] = tensor(tensors[P + name]) if callable(tensor) else tensor
    return tensors


def changed_state(double=True, drop=(), **values):
    tensors = good(double)
    state = json.loads(bytes(tensors[P + bnb.STATE_NF4].tolist()))
    state = {k: v for k, v in {**state, **values}.items() if k not in drop}
    tensors[P + bnb.STATE_NF4] = blob(json.dumps(state).encode())
    return tensors


def blob(data):
    return torch.tensor(list(data), dtype=torch.uint8)


def with_value(value, place=0):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


NAN, INF = float("nan"), float("inf")
DAMAGED = {
    "no codes": (changed(bnb.WEIGHT, None), bnb.WEIGHT, "missing"),
    "no state": (changed(bnb.STATE_NF4, None), bnb.STATE_NF4, "missing"),
    "no absmax": (changed(bnb.ABSMAX, None), bnb.ABSMAX, "missing"),
    "no table": (changed(bnb.QUANT_MAP, None), bnb.QUANT_MAP, "missing"),
    "no nested absmax": (changed(bnb.NESTED_ABSMAX, None), bnb.NESTED_ABSMAX, "missing"),
    "no nested map": (changed(bnb.NESTED_QUANT_MAP, None), bnb.NESTED_QUANT_MAP, "missing"),
    "codes of int32": (changed(bnb.WEIGHT, lambda t: t.int()), bnb.WEIGHT, "storage dtype"),
    "a byte short": (changed(bnb.WEIGHT, lambda t: t[1:]), bnb.WEIGHT, "384 B in one column"),
    "a byte long": (changed(bnb.WEIGHT, lambda t: torch.cat([t, t[:1]])), bnb.WEIGHT, "385 B"),
    "codes in a row": (changed(bnb.WEIGHT, lambda t: t.T), bnb.WEIGHT, r"\[1, 384\]"),
    "codes flat": (changed(bnb.WEIGHT, lambda t: t.view(-1)), bnb.WEIGHT, r"\[384\]"),
    "float absmax": (changed(bnb.ABSMAX, lambda t: t.float()), bnb.ABSMAX, "wrong dtype"),
    "absmax short": (changed(bnb.ABSMAX, lambda t: t[1:]), bnb.ABSMAX, r"expected \[24\]"),
    "absmax NaN": (changed(bnb.ABSMAX, with_value(NAN), False), bnb.ABSMAX, "NaN"),
    "absmax negative": (changed(bnb.ABSMAX, with_value(-1.0), False), bnb.ABSMAX, "negative"),
    "absmax long": (
        changed(bnb.ABSMAX, lambda t: t.repeat(2), False),
        bnb.ABSMAX,
        r"expected \[24\]; found \[48\]",
    ),
    "uint8 absmax without the nested fields": (
        changed(bnb.ABSMAX, lambda t: t.byte(), False),
        bnb.ABSMAX,
        "wrong dtype",
    ),
    "half absmax": (changed(bnb.ABSMAX, lambda t: t.half(), False), bnb.ABSMAX, "wrong dtype"),
    "nested absmax infinite": (
        changed(bnb.NESTED_ABSMAX, with_value(INF)),
        bnb.NESTED_ABSMAX,
        "infinity",
    ),
    "nested absmax double": (
        changed(bnb.NESTED_ABSMAX, lambda t: t.double()),
        bnb.NESTED_ABSMAX,
        "wrong dtype",
    ),
    "nested map short": (
        changed(bnb.NESTED_QUANT_MAP, lambda t: t[:255]),
        bnb.NESTED_QUANT_MAP,
        r"expected \[256\]",
    ),
    "nested map NaN": (
        changed(bnb.NESTED_QUANT_MAP, with_value(NAN, 255)),
        bnb.NESTED_QUANT_MAP,
        "NaN",
    ),
    "another table": (
        changed(bnb.QUANT_MAP, with_value(-0.69, 1)),
        bnb.QUANT_MAP,
        "not the NF4 table",
    ),
    "table of 15": (changed(bnb.QUANT_MAP, lambda t: t[1:]), bnb.QUANT_MAP, r"expected \[16\]"),
    "not UTF-8": (changed(bnb.STATE_NF4, blob(b"\xff\xfe{}")), bnb.STATE_NF4, "not valid JSON"),
    "not JSON": (changed(bnb.STATE_NF4, blob(b"{'a': 1}")), bnb.STATE_NF4, "not valid JSON"),
    "a list": (changed(bnb.STATE_NF4, blob(b"[]")), bnb.STATE_NF4, "expected an object"),
    "empty": (changed(bnb.STATE_NF4, blob(b"")), bnb.STATE_NF4, "not valid JSON"),
    "nested without end": (
        changed(bnb.STATE_NF4, blob(b'{"a":' * 800)),
        bnb.STATE_NF4,
        "not valid JSON",
    ),
    "a long blob": (changed(bnb.STATE_NF4, blob(b" " * 4097)), bnb.STATE_NF4, "too long"),
    "a blob of int64": (changed(bnb.STATE_NF4, lambda t: t.long()), bnb.STATE_NF4, "wrong dtype"),
    "a key twice": (
        changed(bnb.STATE_NF4, blob(b'{"dtype": "float32", "dtype": "float16"}')),
        bnb.STATE_NF4,
        "appears twice",
    ),
    "no shape": (changed_state(drop=["shape"]), bnb.STATE_NF4, "wrong keys"),
    "an unknown key": (changed_state(code="x"), bnb.STATE_NF4, "wrong keys"),
    "no offset": (changed_state(drop=["nested_offset"]), bnb.STATE_NF4, "wrong keys"),
    "nested keys without nested tensors": (
        changed_state(False, nested_blocksize=256, nested_dtype="float32", nested_offset=0.5),
        bnb.ABSMAX,
        "wrong dtype",
    ),
    "nested tensors without nested keys": (
        changed_state(drop=["nested_blocksize", "nested_dtype", "nested_offset"]),
        bnb.STATE_NF4,
        "wrong keys",
    ),
    "quant type": (changed_state(quant_type="fp4"), bnb.STATE_NF4, "wrong quant_type"),
    "blocksize 0": (changed_state(blocksize=0), bnb.STATE_NF4, "wrong blocksize"),
    "blocksize 63": (changed_state(blocksize=63), bnb.STATE_NF4, "wrong blocksize"),
    "blocksize 16": (changed_state(blocksize=16), bnb.STATE_NF4, "wrong blocksize"),
    "blocksize 64": (changed_state(blocksize=64), bnb.ABSMAX, r"expected \[12\]"),
    "blocksize true": (changed_state(blocksize=True), bnb.STATE_NF4, "wrong blocksize"),
    "blocksize 32.0": (changed_state(blocksize=32.0), bnb.STATE_NF4, "wrong blocksize"),
    "blocksize a list": (changed_state(blocksize=[32]), bnb.STATE_NF4, "wrong blocksize"),
    "dtype load": (changed_state(dtype="load"), bnb.STATE_NF4, "wrong dtype"),
    "dtype int8": (changed_state(dtype="int8"), bnb.STATE_NF4, "wrong dtype"),
    "dtype a number": (changed_state(dtype=16), bnb.STATE_NF4, "wrong dtype"),
    "shape too large": (changed_state(shape=[13, 64]), bnb.WEIGHT, "416 B"),
    "shape of one": (changed_state(shape=[768]), bnb.STATE_NF4, "wrong shape"),
    "shape negative": (changed_state(shape=[-12, -64]), bnb.STATE_NF4, "wrong shape"),
    "shape null": (changed_state(shape=None), bnb.STATE_NF4, "wrong shape"),
    "shape floats": (changed_state(shape=[12.0, 64]), bnb.STATE_NF4, "wrong shape"),
    "shape huge": (changed_state(shape=[1 << 40, 1 << 40]), bnb.STATE_NF4, "wrong shape"),
    "nested blocksize": (changed_state(nested_blocksize=64), bnb.STATE_NF4, "nested_blocksize"),
    "nested dtype": (changed_state(nested_dtype="float16"), bnb.STATE_NF4, "wrong nested_dtype"),
    "offset NaN": (changed_state(nested_offset=NAN), bnb.STATE_NF4, "not valid JSON"),
    "offset infinite": (changed_state(nested_offset=-INF), bnb.STATE_NF4, "not valid JSON"),
    "offset 1e39": (changed_state(nested_offset=1e39), bnb.STATE_NF4, "wrong nested_offset"),
    "offset a huge integer": (
        changed_state(nested_offset=10**400),
        bnb.STATE_NF4,
        "a number of 401 digits does not fit a float",
    ),
    "offset a string": (changed_state(nested_offset="0.1"), bnb.STATE_NF4, "wrong nested_offset"),
    "offset true": (changed_state(nested_offset=True), bnb.STATE_NF4, "wrong nested_offset"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_naming_the_file_and_the_tensor(name):
    tensors, suffix, said = DAMAGED[name]
    with pytest.raises(CheckpointError, match=said) as caught:
        bnb.unpack(tensors, P, "dir/a.safetensors")
    assert str(caught.value).startswith("dir/a.safetensors: ")
    assert P + suffix in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_sound_is_read():
    for double in (True, False):
        assert bnb.unpack(good(double), P, "file").shape == (12, 64)


@given(data=st.binary(max_size=300), place=st.integers(0, 160))
def test_no_blob_raises_anything_but_a_checkpoint_error(data, place):
    sound = bytes(good()[P + bnb.STATE_NF4].tolist())
    for candidate in (data, sound[:place] + data + sound[place + len(data) :]):
        tensors = {**good(), P + bnb.STATE_NF4: blob(candidate)}
        with contextlib.suppress(CheckpointError):
            bnb.unpack(tensors, P, "file")
