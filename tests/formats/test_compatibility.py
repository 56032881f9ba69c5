"""Which programs load what: the table of what was tried, and vLLM's demands of what qmix writes."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.commands.checkpoint.inspect import inspect
from qmix.formats import open_checkpoint
from qmix.formats.compatibility import reader_support
from qmix.formats.layouts import compressed_tensors, gptq_config
from qmix.formats.names import spellings
from qmix.formats.readers import vllm
from qmix.formats.readers.storage import StorageSummary, storage_summary
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.weights.scheme import DENSE, NF4, Scheme
from tests.support import packers
from tests.support.packers import ATTENTION, MATRICES, ROUTERS, uniform

INT4, INT8 = Scheme(kind="int4"), Scheme(kind="int8")
ASYMMETRIC = Scheme(kind="int4", symmetric=False)


def gptq(schemes, *, dialect="classic", **changes):
    settings = {**gptq_config.quantization_config(schemes), **changes}
    return StorageSummary(
        schemes=schemes, layouts=frozenset({"GPTQ"}), dialect=dialect, settings=settings
    )


def pack_quantized(schemes, settings=None, **options):
    return StorageSummary(
        schemes=schemes,
        layouts=frozenset({"compressed-tensors"}),
        dialect=options.get("dialect", "classic"),
        settings=settings or compressed_tensors.quantization_config(schemes),
    )


def awq(**options):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    found = StorageSummary(
        schemes=uniform(ASYMMETRIC),
        layouts=frozenset({"AWQ"}),
        dialect="classic",
        settings=settings,
    )
    return replace(found, **options)


def layer(index, scheme):
    return {name: scheme for name in MATRICES if name.startswith(f"model.layers.{index}.")}


DENSE_ONE = StorageSummary(
    schemes=uniform(DENSE), layouts=frozenset(), dialect="classic", settings=None
)
BNB = replace(DENSE_ONE, schemes=uniform(NF4), layouts=frozenset({"bitsandbytes"}))
LINEAR = {
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "group_1": {"targets": ["re:.*layers.1.*experts.*"], "weights": {"num_bits": 8}},
    }
}
NOISE = {
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "group_1": {"targets": ["re:.*layers.1.*experts.*"], "weights": {"num_bits": 4}},
    }
}
NULLS = {"unused": {"targets": None, "weights": None}}

# vLLM 0.33, SGLang 0.5.23, transformers 5.23, gptqmodel 7.7
TABLE = {
    "dense": (DENSE_ONE, "loads", "loads", "loads", "unknown"),
    "nf4": (BNB, "refuses", "refuses", "refuses", "refuses"),
    "gptq": (gptq(uniform(INT4)), "loads", "loads", "noise", "refuses"),
    "gptq 8 bits": (gptq(uniform(INT8)), "loads", "loads", "noise", "refuses"),
    "gptq, 8-bit attention": (gptq(uniform(INT4, attention=INT8)), "loads", "loads", "noise", "refuses"),
    "gptq, dense attention": (gptq(uniform(INT4, attention=DENSE)), "loads", "loads", "noise", "refuses"),
    "gptq, a layer of 8 bits": (gptq(uniform(INT4) | layer(1, INT8)), "loads", "refuses", "noise", "refuses"),
    "gptq, one matrix": (gptq(uniform(INT4) | {MATRICES[5]: INT8}), "refuses", "refuses", "noise", "refuses"),
    "gptqmodel's": (gptq(uniform(INT4), dialect="gptqmodel"), "refuses", "refuses", "noise", "loads"),
    "asymmetric": (gptq(uniform(ASYMMETRIC)), "refuses", "refuses", "noise", "refuses"),
    "asymmetric, gptqmodel's": (
        gptq(uniform(ASYMMETRIC), dialect="gptqmodel"), "refuses", "refuses", "noise", "refuses",
    ),
    "asymmetric v2, gptqmodel's": (
        gptq(uniform(ASYMMETRIC), dialect="gptqmodel", checkpoint_format="gptq_v2"),
        "refuses", "refuses", "noise", "loads",
    ),
    "act-order": (gptq(uniform(INT4), desc_act=True), "refuses", "loads", "noise", "refuses"),
    "attention only": (
        gptq(uniform(DENSE, attention=INT4)), "loads", "refuses", "unknown", "loads",
    ),
    "awq": (awq(), "loads", "loads", "noise", "noise"),
    "awq, gptqmodel's": (awq(dialect="gptqmodel"), "refuses", "refuses", "noise", "loads"),
    "awq without zero_point": (awq(settings={"bits": 4}), "refuses", "refuses", "noise", "noise"),
    "compressed-tensors": (pack_quantized(uniform(INT4)), "loads", "loads", "loads", "unknown"),
    "compressed-tensors, 8-bit attention": (
        pack_quantized(uniform(INT4, attention=INT8)), "loads", "loads", "loads", "unknown",
    ),
    "compressed-tensors, asymmetric": (
        pack_quantized(uniform(ASYMMETRIC), LINEAR), "loads", "refuses", "refuses", "unknown",
    ),
    "compressed-tensors, layers": (
        pack_quantized(uniform(INT8) | layer(1, INT4)), "loads", "loads", "refuses", "unknown",
    ),
    "compressed-tensors, layers, class first": (
        pack_quantized(uniform(INT8) | layer(1, INT4), NOISE), "loads", "refuses", "noise", "unknown",
    ),
    "compressed-tensors, layers, a group of nulls first": (
        pack_quantized(
            uniform(INT8) | layer(1, INT4), {"config_groups": NULLS | NOISE["config_groups"]}
        ),
        "loads", "refuses", "noise", "unknown",
    ),
    "compressed-tensors, layers, a group of nulls only": (
        pack_quantized(uniform(INT8) | layer(1, INT4), {"config_groups": NULLS}),
        "loads", "refuses", "refuses", "unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    summary, *expected = TABLE[name]
    qmix, *others = reader_support(summary)
    assert qmix.outcome == "loads"
    assert [support.outcome for support in others] == expected
    for support in others:
        assert support.reason or support.outcome == "loads", support
    assert [support.tried for support in others[:2]] == [False, False]


def reasons(summary):
    return "; ".join(vllm.problems(summary))


@pytest.mark.parametrize(
    ("summary", "named"),
    [
        (replace(gptq(uniform(INT4)), settings=None), "the settings lack bits, group_size, desc_act, sym"),
        (gptq(uniform(INT4), sym=None), "the settings lack sym"),
        (gptq(uniform(INT4), bits=[4]), "lists of one element"),
        (gptq(uniform(INT4), bits=5), "2, 3, 4 or 8 bits only"),
        (gptq(uniform(INT4), desc_act=True), "dropped act-order"),
        (gptq(uniform(INT4), desc_act=True, group_size=-1, dynamic={"a": {"group_size": 32}}), "dropped act-order"),
        (gptq(uniform(ASYMMETRIC)), "symmetric weights only"),
        (gptq(uniform(INT4) | {ATTENTION[1]: ASYMMETRIC}), "symmetric weights only"),
        (gptq(uniform(INT4) | {ROUTERS[0]: INT4}), "the router unquantized"),
        (gptq(uniform(INT4), dynamic={r"model\.layers\.0\.": {"bits": 8}}), r"takes model.layers.0.self_attn.qkv_proj for int8 g128, but model.layers.0.self_attn.q_proj is int4 g128"),
        (gptq(uniform(INT4), dynamic={r".*\.experts\.\d+": {"bits": 8}}), ""),  # not the fused name
        (gptq(uniform(INT8), bits=4, dynamic={r".*\.\d+\.w\d": {"bits": 8}, ".*_proj": {"bits": 8}}), "block_sparse_moe.experts for int4 g128, but"),
        (gptq(uniform(INT4) | layer(0, DENSE), dynamic={}), "experts for int4 g128, but model.layers.0.block_sparse_moe.experts.0.w1 is 16-bit"),
    ],
)  # fmt: skip
def test_what_vllm_demands_and_does_not_find(summary, named):
    found = reasons(summary)
    assert named in found if named else found == ""


@pytest.mark.parametrize(
    "summary",
    [
        gptq(uniform(INT4)),
        gptq(uniform(INT4, attention=DENSE)),
        gptq(uniform(INT4, attention=DENSE), dynamic={}),  # it sees what is dense by the dtypes
        gptq(uniform(INT4, attention=INT8) | layer(2, Scheme(kind="int4", group_size=32))),
        gptq(uniform(Scheme(kind="int4", group_size=-1)), desc_act=True),
        gptq(uniform(INT4) | layer(0, DENSE)),
    ],
)
def test_what_vllm_demands_and_finds(summary):
    assert reasons(summary) == ""


GPTQ = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq"}


def own(prefix):
    return {"bits": 8} if "self_attn" in prefix or "layers.1" in prefix else {}


def test_what_qmix_writes_meets_vllms_demands(tmp_path):
    packers.checkpoint(tmp_path / "in", packers.compressed, None, own=own)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "in", dtype="bfloat16", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    export_checkpoint(tmp_path / "in", tmp_path / "exported", "gptq")
    for name in ("saved", "exported"):
        summary = storage_summary(open_checkpoint(tmp_path / name).metadata)
        assert len(set(summary.schemes.values())) == 3
        assert reasons(summary) == ""
        assert reader_support(summary)[1].outcome == "loads"


def test_inspect_tells_the_names_and_the_settings_beside_the_config(tmp_path):
    packers.checkpoint(tmp_path, packers.gptq, GPTQ)
    found = {support.reader: support.outcome for support in inspect(tmp_path).readers}
    assert found["vLLM 0.33"] == "loads"
    assert inspect(tmp_path).to_dict()["readers"][3]["outcome"] == "noise"
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {spellings(name)[1]: tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    found = {support.reader: support.outcome for support in inspect(tmp_path).readers}
    assert found["vLLM 0.33"] == "refuses"
    assert found["gptqmodel 7.7"] == "loads"
    packers.checkpoint(tmp_path / "awq", packers.awq, None)
    (tmp_path / "awq" / "quant_config.json").write_text(
        '{"w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "GEMM"}'
    )
    assert inspect(tmp_path / "awq").readers[1].outcome == "loads"
