"""AutoRound's packings: GPTQ's and AWQ's tensors with its own settings, read to the bit.

golden/make_auto_round.py made the files with auto-round 0.16.0.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.compatibility import reader_support
from qmix.formats.layouts import auto_round_config, awq, gptq
from qmix.formats.readers.storage import storage_summary
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support import damaged_folders, packers
from tests.support.models import GOLDEN, read_weights
from tests.support.mutation import outcome
from tests.support.promptness import within

STORED = load_file(GOLDEN / "auto-round-0.16.0.safetensors")
FOLDER = GOLDEN / "auto-round-0.16.0"
RUN = load_file(GOLDEN / "auto-round-0.16.0-logits.safetensors")
SHAPE = (32, 64)
CASES = sorted({name.rpartition(".")[0] for name in STORED})
Q = "model.layers.0.self_attn.q_proj"


def settings_of(case):
    packing, bits, _, group, symmetry = case.split()
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": int(bits),
        "data_type": "int",
        "group_size": int(group.removeprefix("g")),
        "sym": symmetry == "sym",
    }


def read(case, tensors=STORED, **changes):
    settings = {**settings_of(case), **changes}
    layout = "AWQ" if "awq" in case else "GPTQ"
    said = auto_round_config.read(settings, "config.json", layout).for_module(case)
    if layout == "AWQ":
        return awq.unpack(tensors, case, "a file", SHAPE, zero_point=not said.symmetric)
    return gptq.unpack(tensors, case, "a file", SHAPE, said)


def test_every_packing_and_number_of_bits_is_there():
    kinds = {(case.split()[0], int(case.split()[1])) for case in CASES}
    gptq_kinds = {(p, b) for p in ("auto_round", "auto_round:auto_gptq") for b in (2, 3, 4, 8)}
    assert kinds == gptq_kinds | {("auto_round:auto_awq", 4)}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_has_the_values_that_auto_round_gives_it(case):
    """To the bit in float16: one product there, one in float32 that is rounded here."""
    ours = read(case)
    assert ours.bits == int(case.split()[1])
    assert (ours.zeros is None) == case.endswith(" sym")
    assert ours.perm is None
    assert torch.equal(ours.dequantize(), STORED[f"{case}.expected"])


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("auto_round ")])
def test_zeros_declared_in_the_other_version_are_refused_if_symmetric(case):
    other = {"packing_format": "auto_round:auto_gptq"}
    if case.endswith(" sym"):
        with pytest.raises(CheckpointError, match=r"qzeros: not the zeros of a symmetric"):
            read(case, **other)
    else:
        assert not torch.equal(read(case, **other).dequantize(), read(case).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_zero_that_its_versions_disagree_on_is_refused(bits):
    case = f"auto_round:auto_gptq {bits} bits g32 asym"
    tensors = {**STORED, f"{case}.qzeros": torch.full_like(STORED[f"{case}.qzeros"], -1)}
    with pytest.raises(CheckpointError, match=r"qzeros: AutoRound stores no such zero"):
        read(case, tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_again_is_the_file_that_auto_round_wrote(bits, version):
    packing = "auto_round:auto_gptq" if version == 1 else "auto_round"
    case = f"{packing} {bits} bits g32 asym"
    written = gptq.pack(read(case), case, version)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(written[f"{case}.{name}"], STORED[f"{case}.{name}"])


def test_a_whole_mixtral_computes_what_auto_rounds_weights_compute():
    """Its weights are rounded to float16 there, and not here."""
    checkpoint = open_checkpoint(FOLDER)
    model = MixtralForCausalLM.from_pretrained(FOLDER, dtype="float32", device="cpu")
    schemes = set()
    for tensor in checkpoint.tensors:
        if packed := checkpoint.packing(tensor):
            weight = checkpoint.weight(tensor)
            assert weight.scheme == checkpoint.metadata.scheme_of(packed)
            schemes.add(str(weight.scheme))
    assert schemes == {"int4 g32 asymmetric", "int8 g32"}
    with torch.no_grad():
        logits = model(input_ids=RUN["ids"]).logits
    assert (logits - RUN["logits"]).abs().max() <= 2e-3 * RUN["logits"].abs().max()


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "auto-round")


def with_settings(folder, **changes):
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(document))


EIGHT = {"bits": 8, "sym": True}
O_PROJ = {".*self_attn\\.o_proj.*": EIGHT}


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "intel/auto-round"},
        {"extra_config": O_PROJ},
        {"extra_config": {"o_proj$": EIGHT}},
        {"extra_config": {f"model.layers.{i}.self_attn.o_proj": EIGHT for i in (0, 1)}},
        {"extra_config": {**O_PROJ, "model.layers.0.mlp.gate": {"bits": 16}}},
        {"extra_config": {**O_PROJ, ".*k_proj": {}}},
        {"packing_format": "auto_round:gptqmodel"},
        {"block_name_to_quantize": ["model.layers.0", "model.layers.1"]},
        {"block_name_to_quantize": [["model.layers.0", "model.layers.1"]]},
        {"block_name_to_quantize": None},
    ],
)
def test_other_spellings_of_the_same_settings_are_read(folder, changes):
    with_settings(folder, **changes)
    open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing_format": "auto_round:auto_awq"}, r"tensors are GPTQ's, but packing_format"),
        ({"packing_format": "auto_round:exllamav2"}, r"packing_format: no packing.*found.*exllam"),
        ({"packing_format": ["auto_round"]}, r"packing_format: no packing"),
        ({"bits": 5}, r"bits: GPTQ is read in 2, 3, 4 or 8 bits only.*found 5"),
        ({"bits": 3}, r"bits: contradicts the tensors; expected 4"),
        ({"group_size": 64}, r"group_size: contradicts the tensors; expected 32"),
        ({"group_size": "32"}, r"group_size: unknown group size"),
        ({"sym": 1}, r"sym: wrong type"),
        ({"data_type": "nv_fp"}, r"data_type: only integers are read"),
        ({"act_bits": 8}, r"act_bits: quantized activations are not read"),
        ({"super_bits": 6}, r"super_bits is not read"),
        ({"rotation_config": {"a": 1}}, r"rotation_config is not read"),
        ({"extra_config": {}}, r"bits: contradicts the tensors; expected 8"),
        ({"extra_config": {**O_PROJ, Q: {"bits": 16}}}, r"extra_config: contradicts.*q_proj"),
        ({"extra_config": {**O_PROJ, Q: {"bits": 8}}}, r"extra_config: model.*bits: contradicts"),
        ({"extra_config": {**O_PROJ, Q: {"bits": "8"}}}, r"bits: wrong value"),
        ({"extra_config": {**O_PROJ, Q: [8]}}, r"wrong value; expected an object"),
        ({"extra_config": {"(": EIGHT}}, r"extra_config"),
        ({"block_name_to_quantize": "model.layers.0"}, r"block_name_to_quantize: contradicts"),
        ({"block_name_to_quantize": [1]}, r"block_name_to_quantize: wrong value"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused_by_field(folder, changes, named):
    with_settings(folder, **changes)
    with pytest.raises(QmixError, match=named) as caught:
        open_checkpoint(folder)
    assert "config.json" in str(caught.value)


def test_g_idx_may_be_missing_in_its_files_only(folder):
    with_settings(folder, quant_method="gptq", packing_format=None, extra_config=None)
    with pytest.raises(CheckpointError, match=r"missing.*g_idx"):
        open_checkpoint(folder)


def test_awq_with_another_method_is_refused(folder):
    with pytest.raises(UnsupportedError, match="AWQ is read in 4 bits only"):
        auto_round_config.read(
            {**settings_of("auto_round:auto_awq 4 bits g32 sym"), "bits": 3}, "c", "AWQ"
        )


def test_a_mixtral_in_its_awq_packing_is_read(tmp_path):
    settings = settings_of("auto_round:auto_awq 4 bits g32 asym")
    model = packers.checkpoint(tmp_path, packers.awq, settings, symmetric=False, low=0)
    ids = torch.tensor([[5, 6, 7, 99, 3]])
    ours = MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        expected, logits = model(input_ids=ids).logits, ours(input_ids=ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with_settings(tmp_path, sym=True)
    with pytest.raises(CheckpointError, match="zeros, though zero_point"):
        MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")


def test_200_mutations_are_read_or_refused(folder, tmp_path):
    outcomes = []
    for copy in damaged_folders.copies(folder, tmp_path, "auto-round", 200):
        with within(1):
            outcomes.append(outcome(lambda copy=copy: read_weights(copy)))
    assert outcomes.count("refused") > 100


def test_inspect_says_which_programs_load_it():
    """transformers with auto-round was tried: golden/make_auto_round.py."""
    found = reader_support(storage_summary(open_checkpoint(FOLDER).metadata))
    assert [(it.reader, it.outcome, it.tried) for it in found] == [
        ("qmix", "loads", True),
        ("vLLM 0.33", "unknown", False),
        ("SGLang 0.5.23", "unknown", False),
        ("transformers 5.23", "loads", True),
        ("gptqmodel 7.7", "unknown", False),
    ]


def test_it_is_exported_as_gptq_to_the_bit(tmp_path):
    export_checkpoint(FOLDER, tmp_path / "out", "gptq")
    packers.equal(FOLDER, tmp_path / "out")


@pytest.mark.parametrize(("name", "data_type"), [("nvfp4", "nv_fp"), ("mxfp4", "mx_fp")])
def test_its_fp4_packing_is_compressed_tensors(tmp_path, name, data_type):
    golden = GOLDEN / "compressed-tensors-0.20.0" / name
    folder = shutil.copytree(golden, tmp_path / name)
    document = json.loads((folder / "config.json").read_text())
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 4,
        "act_bits": 4,
        "group_size": 16,
        "data_type": data_type,
    }
    document["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(document))
    ours, theirs = open_checkpoint(folder), open_checkpoint(golden)
    for tensor in ours.tensors:
        if ours.packing(tensor):
            expected = theirs.weight(tensor).dequantize(torch.float32)
            assert torch.equal(ours.weight(tensor).dequantize(torch.float32), expected)
    for changes, named in (
        ({"packing_format": "auto_round:auto_gptq"}, "packing_format: the tensors are compressed"),
        ({"data_type": "int"}, "data_type: only NVFP4 and MXFP4"),
        ({"bits": 8}, "bits: FP4 has 4 bits"),
        ({"rotation_config": {"a": 1}}, "rotation_config is not read"),
    ):
        with_settings(folder, **{**settings, "rotation_config": None, **changes})
        with pytest.raises(UnsupportedError, match=named):
            open_checkpoint(folder)
