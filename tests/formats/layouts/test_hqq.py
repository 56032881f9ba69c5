"""HQQ's layout: what hqq 0.2.8 wrote is read to the bit, and what is not read is refused by name.

golden/make_hqq.py made the files.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.compatibility import reader_support
from qmix.formats.layouts import hqq, hqq_config
from qmix.formats.readers.storage import storage_summary
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from tests.support import damaged_folders
from tests.support.models import GOLDEN, load_in_tiers, read_weights
from tests.support.mutation import outcome
from tests.support.promptness import within

STORED = load_file(GOLDEN / "hqq-0.2.8.safetensors")
FOLDER = GOLDEN / "hqq-0.2.8"
RUN = load_file(GOLDEN / "hqq-0.2.8-logits.safetensors")
SHAPE = (16, 64)
CASES = sorted({name.rpartition(".")[0] for name in STORED} - {"axis0"})
BITS = {"1bit": 2, "1.58bit": 2, "2bit": 2, "3bit": 3, "4bit": 4, "5bit": 8, "6bit": 8, "8bit": 8}


def read(tensors, case, shape=SHAPE):
    return hqq.unpack(tensors, case, "model.safetensors", shape)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_has_the_values_that_hqq_gives_it(case):
    """To the bit, with hqq computing in float32."""
    ours = read(STORED, case)
    expected = STORED[f"{case}.expected"]
    assert expected.dtype == torch.float32
    assert torch.equal(ours.dequantize(torch.float32), expected)
    assert ours.bits == BITS[case.partition("-")[0]]
    assert ours.dtype == STORED[f"{case}.scale"].dtype
    groups = STORED[f"{case}.scale"].numel()
    floats = 2 * STORED[f"{case}.scale"].itemsize
    assert ours.nbytes == 16 * 64 * ours.bits // 8 + groups * floats
    assert ours.nbytes == ours.scheme.nbytes(SHAPE)


@pytest.mark.parametrize("case", CASES)
def test_slabs_of_a_row_give_the_same_codes(case, monkeypatch):
    whole = read(STORED, case)
    monkeypatch.setattr(hqq, "_SLAB", 1)
    assert torch.equal(read(STORED, case).codes, whole.codes)


def test_hqq_in_float16_is_within_its_two_roundings():
    layer = read(STORED, "4bit")
    codes = STORED["4bit.W_q"]
    codes = torch.cat((codes >> 4, codes & 15)).half()
    theirs = ((codes - STORED["4bit.zero"]) * STORED["4bit.scale"]).view(SHAPE)
    ours = layer.dequantize()
    assert ours.dtype == theirs.dtype == torch.float16
    assert (ours.float() - theirs.float()).abs().max() <= 2**-10 * theirs.float().abs().max()


def test_groups_along_the_outputs_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"axis0\.axis: groups along the outputs.*axis=1"):
        read(STORED, "axis0")


def edited(case, suffix, edit):
    tensors = {name: value for name, value in STORED.items() if name.startswith(case + ".")}
    tensors[case + suffix] = edit(tensors[case + suffix].clone())
    return tensors


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("case", "suffix", "edit", "named"),
    [
        ("4bit", ".W_q", lambda t: t[:-1], r"W_q: wrong shape; expected \[8, 64\]; found \[7, 64\]"),
        ("4bit", ".W_q", lambda t: t.int(), r"W_q: wrong dtype; expected torch.uint8"),
        ("4bit-view", ".W_q", lambda t: t.view(torch.uint8), r"W_q: not viewed as floats"),
        ("3bit-view", ".W_q", lambda t: t[:, :-1], r"W_q: wrong shape"),
        ("4bit", ".scale", lambda t: t / 0, r"scale: holds NaN or infinity"),
        ("4bit", ".zero", lambda t: t * torch.nan, r"zero: holds NaN or infinity"),
        ("4bit", ".zero", lambda t: t.float(), r"zero: wrong dtype; expected torch.float16"),
        ("4bit", ".scale", lambda t: t[:, 0], r"scale: wrong shape; expected \[16, 1\]"),
        ("4bit", ".scale", lambda t: t.int(), r"scale: wrong dtype; expected float16"),
        ("4bit", ".nbits", lambda t: t - 1, r"nbits: not the bits of 4bit_u8; expected 4; found 3"),
        ("4bit", ".nbits", lambda t: t * torch.nan, r"nbits: not the bits"),
        ("4bit", ".nbits", lambda t: t.long(), r"nbits: wrong dtype"),
        ("4bit", ".axis", lambda t: t * 2, r"axis: wrong value; expected 1; found 2"),
        ("4bit", ".shape", lambda t: t.flip(0), r"shape: not the model's.*\[64, 16\]"),
        ("4bit", ".group_size", lambda t: t * 2, r"group_size: groups straddle.*found 128"),
        ("4bit", ".group_size", lambda t: t * 0, r"group_size: groups straddle"),
        ("4bit", ".group_size", lambda t: t // 16, r"group_size: .*multiple of 8.*found 4"),
        ("4bit", ".group_size", lambda t: t // 2, r"W_q: wrong shape; expected \[16, 32\]"),
        ("4bit", ".packing", lambda t: text("2bit_u8"), r"nbits: not the bits of 2bit_u8"),
        ("4bit", ".packing", lambda t: text("\x1b[31m"), r"packing: wrong text"),
        ("4bit", ".packing", lambda t: t.repeat(100), r"packing: wrong text"),
        ("4bit", ".unpack_view_dtype", lambda t: text("torch.int8"), r"unpack_view_dtype: wrong"),
        ("4bit", ".compute_dtype", lambda t: text("torch.int8"), r"compute_dtype: wrong text"),
        ("4bit", ".view_as_float", lambda t: t + 7, r"view_as_float: wrong value"),
        ("4bit", ".channel_wise", lambda t: t * 0, r"one scale for a whole weight is not read"),
        ("4bit", ".quant_scale", lambda t: t + 1, r"quant_scale: scales that are quantized"),
        ("4bit", ".quant_zero", lambda t: t + 1, r"quant_zero: scales that are quantized"),
    ],
)  # fmt: skip
def test_a_damaged_weight_is_refused_by_name(case, suffix, edit, named):
    with pytest.raises(QmixError, match=named) as caught:
        read(edited(case, suffix, edit), case)
    assert str(caught.value).startswith("model.safetensors")


@pytest.mark.parametrize("suffix", hqq_config._REQUIRED)
def test_a_missing_tensor_is_named(suffix):
    tensors = edited("4bit", suffix, lambda t: t)
    del tensors["4bit" + suffix]
    with pytest.raises(CheckpointError, match=rf"4bit\{suffix}: missing"):
        read(tensors, "4bit")


def test_what_older_versions_did_not_store_may_be_missing():
    tensors = edited("4bit", ".W_q", lambda t: t)
    for suffix in hqq_config._OPTIONAL:
        tensors.pop("4bit" + suffix, None)
    values = read(tensors, "4bit").dequantize(torch.float32)
    assert torch.equal(values, STORED["4bit.expected"])


def test_experts_of_2_bits_beside_attention_of_4_compute_what_hqq_computes():
    model = MixtralForCausalLM.from_pretrained(FOLDER, dtype="float32", device="cpu")
    with torch.no_grad():
        logits = model(input_ids=RUN["ids"]).logits
    assert (logits - RUN["logits"]).abs().max() <= 1e-5 * RUN["logits"].abs().max()


def test_the_headers_tell_the_scheme_that_the_data_have():
    checkpoint = open_checkpoint(FOLDER)
    schemes = set()
    for tensor in checkpoint.tensors:
        if packed := checkpoint.packing(tensor):
            weight = checkpoint.weight(tensor)
            assert weight.scheme == checkpoint.metadata.scheme_of(packed)
            schemes.add(str(weight.scheme))
    assert schemes == {"int2 g16 asymmetric", "int4 g64 asymmetric"}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "hqq")


def with_settings(folder, edit):
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = edit(document["quantization_config"])
    (folder / "config.json").write_text(json.dumps(document))


def changed(**params):
    """Settings with `params` changed for the projections of q."""

    def edit(settings):
        settings["quant_config"]["self_attn.q_proj"]["weight_quant_params"].update(params)
        return settings

    return edit


def one_for_all(**params):
    four = {"nbits": 4, "group_size": 64, "axis": 1, **params}
    return lambda settings: {**settings, "quant_config": {"weight_quant_params": four}}


def without_q(settings):
    del settings["quant_config"]["self_attn.q_proj"]
    return settings


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (changed(nbits=2), r"nbits: contradicts the tensors; expected 4.*q_proj.*found 2"),
        (changed(nbits=7), r"nbits: wrong value"),
        (changed(nbits=[4]), r"nbits: wrong value"),
        (changed(group_size=32), r"group_size: contradicts the tensors; expected 64"),
        (changed(group_size="64"), r"group_size: wrong value"),
        (changed(axis=0), r"axis: HQQ's groups along the outputs are not read"),
        (changed(axis=None, view_as_float=1), r"view_as_float: wrong type"),
        (one_for_all(), r"nbits: contradicts the tensors; expected 2"),
        (without_q, r"quant_config: contradicts the tensors; expected 'self_attn.q_proj'"),
        (lambda s: {**s, "skip_modules": ["self_attn.v_proj"]}, r"skip_modules: contradicts"),
        (lambda s: {**s, "skip_modules": "lm_head"}, r"skip_modules: wrong value"),
        (lambda s: {**s, "quant_method": "gptq"}, r"quant_method names another method"),
        (lambda s: {**s, "quant_config": []}, r"quant_config: wrong value"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused_by_field(folder, edit, named):
    with_settings(folder, edit)
    with pytest.raises(QmixError, match=named) as caught:
        open_checkpoint(folder)
    assert "config.json" in str(caught.value)


def test_hqqs_own_saving_writes_no_settings(folder):
    with_settings(folder, lambda settings: None)
    open_checkpoint(folder)


def test_axis_0_is_refused_from_the_headers(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.scale"
    tensors[name] = tensors[name].view(1, -1).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"tensor {name}: groups along the outputs"):
        open_checkpoint(folder)


def test_200_mutations_are_read_or_refused(folder, tmp_path):
    outcomes = []
    for copy in damaged_folders.copies(folder, tmp_path, "hqq", 200):
        with within(1):
            outcomes.append(outcome(lambda copy=copy: read_weights(copy)))
    assert outcomes.count("refused") > 100


def test_inspect_says_which_programs_load_it():
    found = reader_support(storage_summary(open_checkpoint(FOLDER).metadata))
    assert [(it.reader, it.outcome) for it in found] == [
        ("qmix", "loads"),
        ("vLLM 0.33", "refuses"),
        ("SGLang 0.5.23", "refuses"),
        ("transformers 5.23", "unknown"),
        ("gptqmodel 7.7", "unknown"),
    ]


def test_experts_are_read_from_the_file_as_they_are_needed():
    whole = MixtralForCausalLM.from_pretrained(FOLDER, device="cpu")
    tiered = load_in_tiers(FOLDER, "cpu", Tiers(device=0, host=2))
    with torch.no_grad():
        expected, logits = (model(input_ids=RUN["ids"]).logits for model in (whole, tiered))
    assert torch.equal(logits, expected)


def test_no_other_layout_takes_its_zeros(tmp_path):
    with pytest.raises(UnsupportedError, match="zeros that are no codes"):
        export_checkpoint(FOLDER, tmp_path / "out", "gptq")
