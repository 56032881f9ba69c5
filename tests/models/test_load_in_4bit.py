"""load_in_4bit and quantization_config: a dense checkpoint in the 4 bits of qmix quantize."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix.errors import ResourceError, UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.models import quantization
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.planning import plan
from qmix.weights.scheme import Scheme
from tests.support.models import GOLDEN, TINY, quantized, write_dense
from tests.support.process import succeeds

FP4 = Scheme(kind="fp4", double_quant=False)


def files(folder):
    return {
        name: t
        for path in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_the_tiny_model_has_the_bytes_of_qmix_quantize(tiny_nf4, tmp_path):
    model = MixtralForCausalLM.from_pretrained(TINY, load_in_4bit=True, device="cpu")
    again = MixtralForCausalLM.from_pretrained(tiny_nf4, device="cpu")
    assert model.dtype == again.dtype == torch.bfloat16
    assert model.config.quantization_config == again.config.quantization_config
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    model.save_pretrained(tmp_path / "out")
    same(files(tmp_path / "out"), files(tiny_nf4))


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
                "bnb_4bit_use_double_quant": False,
            },
            FP4,
        ),
        (
            qmix.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=False),
            Scheme(kind="nf4", double_quant=False),
        ),
    ],
    ids=["fp4", "nf4"],
)
def test_every_scheme_of_bitsandbytes(tmp_path, config, scheme):
    source = write_dense(tmp_path / "source", num_hidden_layers=1)
    model = MixtralForCausalLM.from_pretrained(source, quantization_config=config, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    same(files(tmp_path / "saved"), files(quantized(source, tmp_path / "out", scheme)))


def test_transformers_own_object_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    source = write_dense(tmp_path / "source", num_hidden_layers=1)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "self_attn", "experts.3.w2"]
    )
    model = MixtralForCausalLM.from_pretrained(source, quantization_config=config, device="cpu")
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.stored.scheme.kind == "dense"
    experts = layer.block_sparse_moe.experts
    assert [str(e.w2.stored.scheme) for e in experts[2:4]] == ["fp4 b64", "16-bit"]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    model = MixtralForCausalLM.from_pretrained(source, quantization_config=config, device="cpu")
    assert model.dtype == torch.float16
    with pytest.raises(UnsupportedError, match=r"by 'gptq' while loading.*qmix quantize"):
        MixtralForCausalLM.from_pretrained(
            source, quantization_config={"quant_method": "gptq", "bits": 4}, device="cpu"
        )


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"load_in_8bit": True}, UnsupportedError, "8 bits"),
        ({"load_in_4bit": "yes"}, UsageError, "load_in_4bit"),
        (
            {"load_in_4bit": True, "quantization_config": {"load_in_4bit": True}},
            UsageError,
            "either",
        ),
        ({"quantization_config": {"load_in_4bits": True}}, UsageError, "load_in_4bits"),
        ({"quantization_config": 4}, UsageError, "quantization_config"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, UsageError, "nf5"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, UsageError, "int8"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, UsageError, "skip_modules"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(options, error, named):
    with pytest.raises(error, match=named):
        MixtralForCausalLM.from_pretrained(TINY, device="cpu", **options)


def test_what_is_quantized_already_is_loaded_as_it_is(tiny_nf4):
    with pytest.warns(UserWarning, match=r"is quantized already \(bitsandbytes\)"):
        model = MixtralForCausalLM.from_pretrained(tiny_nf4, load_in_4bit=True, device="cpu")
    assert model.model.layers[0].self_attn.q_proj.stored.scheme == Scheme(kind="nf4")


def test_a_model_that_does_not_fit_is_sent_to_qmix_quantize():
    checkpoint = open_checkpoint(TINY)
    rounded = quantization.of_checkpoint(checkpoint, qmix.BitsAndBytesConfig(load_in_4bit=True))
    planned = plan.plan(rounded.stored_model(torch.bfloat16), gpu=False)
    ram = planned.host_memory.total - planned.host_memory["experts"] // 2
    with pytest.raises(ResourceError, match=r"load_in_4bit: the experts do not all fit.*quantize"):
        MixtralForCausalLM.from_pretrained(
            TINY, load_in_4bit=True, device="cpu", max_memory={"cpu": ram}
        )


@pytest.mark.parametrize("name", ["transformers-fp8-5.23.0/tensor", "modelopt-0.47.0/fp8"])
def test_an_fp8_source_is_rounded_from_the_same_numbers(name, tmp_path):
    source = GOLDEN / name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*scales of activations", UserWarning)
        model = MixtralForCausalLM.from_pretrained(source, load_in_4bit=True, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    same(files(tmp_path / "saved"), files(quantized(source, tmp_path / "out")))


SCRIPT = """
import sys, torch, warnings
from qmix import MixtralForCausalLM
from qmix.planning.process_memory import peak_resident_bytes, resident_bytes
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    model = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is resident now
    before = resident_bytes()
    model = MixtralForCausalLM.from_pretrained(path, load_in_4bit=True, device="cpu")
    print((peak_resident_bytes() - before) >> 20, model.get_memory_footprint() >> 20)
"""


def in_fp8(folder):
    """The checkpoint with its experts in FP8, as transformers writes them."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    skipped = ["lm_head", "gate", "self_attn"]
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None,
        "modules_to_not_convert": skipped,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(sys.platform != "linux", reason="no peak is told elsewhere")
def test_loading_takes_the_4_bit_model_and_one_expert(tmp_path):
    small = write_dense(tmp_path / "small", num_hidden_layers=1)
    shape = {"num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 4096}
    large = write_dense(tmp_path / "large", **shape)
    shutil.copytree(large, tmp_path / "fp8")
    in_fp8(tmp_path / "fp8")
    expert = 3 * 512 * 4096 * 2 >> 20
    # glibc keeps freed blocks below a threshold that moves; the real model's are all above it.
    returned = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    printed = succeeds(SCRIPT, small, large, tmp_path / "fp8", environment=returned)
    _, *loads = printed.splitlines()
    for source, load in zip(("bf16", "fp8"), loads, strict=True):
        grew, model = map(int, load.split())
        print(f"{source}: {model} MiB of model, {expert} of an expert; the process grew by {grew}")
        assert model // 2 < grew < model + expert + 8
