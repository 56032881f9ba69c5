"""FP8 checkpoints as a source: read to the bits of their tools, quantized, converted and scored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.dequantize import dequantize_checkpoint
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError, UnsupportedError
from qmix.evals.quality import evaluation, texts
from qmix.formats import open_checkpoint
from qmix.formats.layouts import fp8, fp8_config
from qmix.formats.layouts.fp8_blocks import block_size
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.planning.stored_model import StoredModel
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.dense import Dense
from qmix.weights.scheme import NF4, Recipe
from tests.support.golden import (
    COMPRESSED,
    MODELOPT,
    TRANSFORMERS_FP8,
    expected_weights,
    golden_folder,
)
from tests.support.models import TINY, load_in_tiers, small_model

FP8 = [
    (COMPRESSED, "fp8-tensor", "fp8 per tensor"),
    (COMPRESSED, "fp8-channel", "fp8 per output"),
    (COMPRESSED, "fp8-block", "fp8 in blocks"),
    (MODELOPT, "fp8", "fp8 per tensor"),
    (TRANSFORMERS_FP8, "block", "fp8 in blocks"),
    (TRANSFORMERS_FP8, "ue8m0", "fp8 in blocks"),
    (TRANSFORMERS_FP8, "tensor", "fp8 per tensor"),
]
FOLDERS = [(maker, name) for maker, name, _ in FP8]
P = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"
IDS = torch.tensor([[5, 6, 7, 33, 3], [1, 0, 2, 63, 4]])

pytestmark = pytest.mark.filterwarnings("ignore:.*are not used", "ignore:.*FP8 weights")


@pytest.mark.parametrize(("maker", "name"), [*FOLDERS, (COMPRESSED, "mixed")])
def test_the_values_are_those_of_the_maker(maker, name):
    checkpoint = open_checkpoint(golden_folder(maker, name))
    expected = expected_weights(maker, name)
    seen = 0
    for tensor in checkpoint.tensors:
        packing = checkpoint.packing(tensor)
        if packing is None or not packing.dense:
            continue
        weight = checkpoint.weight(tensor)
        assert isinstance(weight, Dense)
        assert not checkpoint.packed(tensor)
        for key in (tensor.prefix, f"{tensor.prefix}.float32"):
            if key in expected:
                values = expected[key]
                assert torch.equal(weight.dequantize(values.dtype), values)
                seen += 1
    assert seen >= 4


@pytest.mark.parametrize(("maker", "name", "scheme"), FP8)
def test_inspect_says_for_what_there_is_a_scale(maker, name, scheme):
    inventory = inspect(golden_folder(maker, name))
    groups = {(group.kind, group.layout): group for group in inventory.groups}
    assert groups["expert", "FP8"].scheme == scheme
    assert 8 <= groups["expert", "FP8"].bits_per_weight < 8.6


def test_one_scale_an_output_is_fbgemms_layout(tmp_path):
    """`fbgemm_fp8` (transformers 5.23, integrations/fbgemm_fp8.py): weight_scale [N, 1]."""
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors, meant = {}, {}
    (path,) = tmp_path.glob("*.safetensors")
    for name, data in load_file(path).items():
        if "_proj" not in name and ".experts." not in name:
            tensors[name] = data
            continue
        scale = data.float().abs().amax(1, keepdim=True) / 448
        tensors[name] = (data.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        meant[name] = tensors[name].float() * scale
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, path)
    document = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    settings["modules_to_not_convert"] = ["lm_head", "gate"]
    document["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(document))
    checkpoint = open_checkpoint(tmp_path)
    for tensor in checkpoint.tensors:
        if tensor.name in meant:
            assert torch.equal(checkpoint.dense(tensor), meant[tensor.name])
    verification = verify(tmp_path)
    assert not verification.problems


@pytest.mark.parametrize(("maker", "name"), FOLDERS)
def test_it_converts_to_16_bits_and_loads_and_scores_alike(maker, name, tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(golden_folder(maker, name), folder)
    done = dequantize_checkpoint(folder, tmp_path / "dense")
    assert done.weights == 10
    source, dense = open_checkpoint(folder), open_checkpoint(tmp_path / "dense")
    assert dense.config.quantization_config is None
    for tensor in dense.tensors:
        expected = source.dense(tensor).to(torch.bfloat16)
        assert torch.equal(dense.read(tensor.name), expected)
    one, other = (
        MixtralForCausalLM.from_pretrained(path, device="cpu")
        for path in (folder, tmp_path / "dense")
    )
    assert one.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize(("maker", "name"), FOLDERS)
def test_logits_are_those_of_the_dequantized_weights(maker, name, tmp_path):
    folder = golden_folder(maker, name)
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    checkpoint = open_checkpoint(folder)
    tensors = {t.name: checkpoint.dense(t).float().contiguous() for t in checkpoint.tensors}
    save_file(tensors, tmp_path / FILE)
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    dense = MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        difference = (model(input_ids=IDS).logits - dense(input_ids=IDS).logits).abs().max()
    assert float(difference) < 1e-5


def tiny_fp8(folder):
    """The tiny model in FP8 with a scale a tensor, as AutoFP8 writes it, beside its tokenizer."""
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copy(path, folder)
    tensors = {}
    for path in TINY.glob("*.safetensors"):
        for name, data in load_file(path).items():
            tensors[name] = data
            if "_proj" in name or ".experts." in name:
                scale = data.float().abs().max() / 448
                tensors[name] = (data.float() / scale).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = scale
                tensors[name.replace("weight", "input_scale")] = torch.tensor(0.02)
    save_file(tensors, folder / FILE)
    document = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    document["quantization_config"] = settings | {"ignored_layers": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_the_tiny_model_in_fp8_is_quantized_and_scored_like_its_16_bits(tmp_path):
    folder = tiny_fp8(tmp_path / "fp8")
    dequantize_checkpoint(folder, tmp_path / "dense")
    recipe = Recipe.uniform(NF4, attention=True)
    quantize_streaming(folder, tmp_path / "nf4", recipe, method="nf4")
    checkpoint = open_checkpoint(tmp_path / "nf4")
    assert checkpoint.config.quantization_config["quant_method"] == "bitsandbytes"
    exact = {
        t.name: open_checkpoint(folder).dense(t)
        for t in open_checkpoint(folder).tensors
        if t.kind == "expert" and t.layer == 1
    }
    for tensor in checkpoint.tensors:
        if tensor.name in exact:
            values = checkpoint.weight(tensor).dequantize(torch.float32)
            error = (values - exact[tensor.name]).norm() / exact[tensor.name].norm()
            assert float(error) < 0.12
    text = texts.Text.of("The river runs past the mill, and nobody knows how deep it is. " * 12)
    scores = [
        evaluation.evaluate(path, text, window=64, dtype="float32", device="cpu").perplexity
        for path in (folder, tmp_path / "dense", TINY)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)
    assert scores[0] == pytest.approx(scores[2], rel=0.1)
    plain = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    tiered = load_in_tiers(folder, torch.device("cpu"), Tiers(device=0, host=4))
    ids = torch.tensor([[1, 17, 300, 5]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, tiered(ids).logits)


def test_a_plan_counts_16_bits_in_memory_and_8_in_the_file(tmp_path):
    folder = tiny_fp8(tmp_path / "fp8")
    stored, whole = (
        StoredModel.of(open_checkpoint(path).metadata, "bfloat16") for path in (folder, TINY)
    )
    assert stored.dense
    memory = [sum(weight.memory_bytes(2) for weight in model.weights) for model in (stored, whole)]
    assert memory[0] == memory[1]
    assert 0.5 < stored.file_bytes / whole.file_bytes < 0.6
    assert stored.loading >= 5 * 256 * 256


@pytest.mark.filterwarnings("default")
def test_loading_says_once_what_becomes_of_it(tmp_path):
    folder = tiny_fp8(tmp_path / "fp8")
    with pytest.warns(
        UserWarning, match="FP8 weights are loaded in 16 bits; qmix quantize"
    ) as all_:
        MixtralForCausalLM.from_pretrained(folder, device="cpu")
    texts = [str(warning.message) for warning in all_]
    assert sum("84 scales of activations are not used" in text for text in texts) == 1
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("extent", "blocks", "size"),
    [(14336, 112, 128), (4096, 32, 128), (300, 3, 128), (64, 2, 32), (100, 3, None), (64, 1, 128)],
)
def test_the_size_of_a_block_follows_from_their_number(extent, blocks, size):
    assert block_size(extent, blocks) == size


def stored(weight=None, **others):
    weight = torch.ones(8, 32).to(torch.float8_e4m3fn) if weight is None else weight
    tensors = {f"{P}.weight": weight, f"{P}.weight_scale": torch.tensor(0.5)}
    tensors |= {f"{P}.{name}": value for name, value in others.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (stored(torch.full((8, 32), float("nan")).to(torch.float8_e4m3fn)), "weight: holds NaN.*256"),
        (stored(torch.ones(8, 16).to(torch.float8_e4m3fn)), r"weight: wrong shape.*\[8, 32\]"),
        (stored(torch.ones(8, 32)), "weight: wrong dtype.*float8_e4m3fn.*float32"),
        (stored(weight_scale=None), "weight_scale: missing"),
        (stored(weight_scale=torch.tensor(float("inf"))), "weight_scale: holds NaN or infinity"),
        (stored(weight_scale=torch.ones(3)), r"weight_scale: wrong shape.*\[3\]"),
        (stored(weight_scale=torch.ones(3, 5)), r"weight_scale: wrong shape.*\[3, 5\]"),
        (stored(weight_scale=torch.ones(1, dtype=torch.int32)), "weight_scale: wrong dtype"),
        (stored(input_scale=torch.tensor(-1.0)), "input_scale: wrong value.*above 0"),
        (stored(input_scale=torch.ones(2)), "input_scale: wrong shape"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(tensors, named):
    with pytest.raises(CheckpointError, match=named):
        fp8.unpack(tensors, P, FILE, (8, 32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method names another.*'fp8'.*'gptq'"),
        ({"weight_block_size": [64, 64]}, "weight_block_size.*contradicts.*scales"),
        ({"weight_block_size": [0, 64]}, "weight_block_size.*two numbers"),
        ({"activation_scheme": "both"}, "activation_scheme.*'dynamic' or 'static'"),
        ({"modules_to_not_convert": ["self_attn"]}, "modules_to_not_convert.*contradicts"),
        ({"expert_dtype": "fp4"}, "expert_dtype"),
    ],
)
def test_settings_that_say_otherwise_are_refused(tmp_path, change, named):
    shutil.copytree(golden_folder(TRANSFORMERS_FP8, "block"), tmp_path / "fp8")
    document = json.loads((tmp_path / "fp8" / "config.json").read_text())
    document["quantization_config"] |= change
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "fp8")


def test_a_checkpoint_without_fp8_is_not_converted(tmp_path):
    with pytest.raises(UnsupportedError, match="nothing to convert"):
        dequantize_checkpoint(TINY, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="quantized checkpoint is not converted"):
        dequantize_checkpoint(golden_folder(COMPRESSED, "nvfp4"), tmp_path / "out")
    assert fp8_config.read(None, FILE).settings.fields == {}
