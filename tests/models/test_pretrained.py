"""from_pretrained and save_pretrained: options, round trips, what is refused by name."""

import json
import shutil

import pytest
import torch

import qmix
from qmix.errors import CheckpointError, QmixError, UnsupportedError, UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.mixtral import MixtralModel
from tests.support.models import TINY, small_model

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13]])


@pytest.fixture
def saved(tmp_path):
    small_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"device": "cpu", "low_cpu_mem_usage": True, "use_safetensors": True},
        {"device": "cpu", "trust_remote_code": False, "local_files_only": True, "revision": None},
        {"device_map": "balanced", "max_memory": {"cpu": "8GiB"}, "variant": None, "subfolder": ""},
        {"device": "cpu", "load_in_4bit": False, "quantization_config": None},
        {"device": "cpu", "torch_dtype": "auto"},
        {"device": "cpu", "dtype": torch.float32, "torch_dtype": "float32"},
    ],
    ids=str,
)
def test_the_options_of_transformers_that_are_so_anyway_are_taken(saved, options):
    model = MixtralForCausalLM.from_pretrained(saved, **options)
    expected = MixtralForCausalLM.from_pretrained(saved, device="cpu")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_memory": {0: "1GiB", 1: "1GiB"}}, "max_memory"),
        ({"max_memory": {"cpu": "1GiB"}, "ram": "1GiB"}, "max_memory"),
        ({"output_loading_info": True}, "output_loading_info"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "device_map"),
        ({"device_map": "halves"}, "device_map"),
        ({"device_map": "cpu", "device": "cpu"}, "device_map"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"atn_implementation": "eager"}, "atn_implementation"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "differ"),
        ({"torch_dtype": "int8"}, "dtype"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(saved, options, named):
    with pytest.raises((UsageError, UnsupportedError, QmixError), match=named):
        MixtralForCausalLM.from_pretrained(saved, **options)


@torch.no_grad()
def test_fields_that_no_shape_depends_on_may_be_set_while_loading(saved):
    plain = MixtralForCausalLM.from_pretrained(saved, device="cpu")(IDS).logits
    for options in ({"sliding_window": 3}, {"num_experts_per_tok": 3}, {"rope_theta": 100.0}):
        model = MixtralForCausalLM.from_pretrained(saved, device="cpu", **options)
        name, value = next(iter(options.items()))
        assert getattr(model.config, name) == value
        assert not torch.allclose(model(IDS).logits, plain, atol=1e-3)
    model = MixtralForCausalLM.from_pretrained(saved, device="cpu", output_router_logits=True)
    assert model(IDS).aux_loss is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_may_be_asked_for_in_either_spelling(saved, dtype):
    for name in ("torch_dtype", "dtype"):
        for value in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
            model = MixtralForCausalLM.from_pretrained(saved, device="cpu", **{name: value})
            assert model.dtype == dtype
    assert torch.isfinite(model(IDS).logits).all()
    assert model(IDS).logits.dtype == torch.float32


@torch.no_grad()
def test_the_headless_model_survives_save_and_load(tmp_path):
    model = small_model(num_hidden_layers=1).model
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MixtralModel"]
    again = MixtralModel.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(again(IDS).last_hidden_state, model(IDS).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"without this head.*lm_head\.weight"):
        MixtralForCausalLM.from_pretrained(tmp_path, device="cpu")


def test_models_are_modules_like_any_other():
    model = small_model(num_hidden_layers=1)
    assert isinstance(model, torch.nn.Module)
    assert model.to("cpu") is model
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.eval() is model
    assert {p.dtype for p in model.to(torch.float64).parameters()} == {torch.float64}
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model(IDS)
    handle.remove()
    model(IDS)
    assert seen == [1]


@torch.no_grad()
def test_moving_a_4_bit_model_keeps_its_codes(tiny_nf4):
    model = MixtralForCausalLM.from_pretrained(tiny_nf4, device="cpu", dtype="float32")
    expected = model(IDS).logits
    assert model.to("cpu") is model
    assert torch.equal(model(IDS).logits, expected)
    half = model.to(torch.bfloat16)
    assert half is model
    stored = half.model.layers[0].self_attn.q_proj.stored
    assert stored.scheme.kind == "nf4"
    assert torch.isfinite(half(IDS).logits).all()


@torch.no_grad()
def test_auto_classes_and_load_take_the_same_options(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    model = qmix.AutoModelForCausalLM.from_pretrained(
        tmp_path / "tiny", torch_dtype=torch.float16, attn_implementation="eager", device_map="cpu"
    )
    assert model.dtype == torch.float16
    assert model.model.attn_implementation == "eager"
    loaded, tokenizer = qmix.load(
        tmp_path / "tiny", device="cpu", attn_implementation="eager", sliding_window=64
    )
    assert loaded.model.attn_implementation == "eager"
    assert loaded.config.sliding_window == 64
    assert loaded.tokenizer is tokenizer


@torch.no_grad()
def test_initial_weights_have_the_configs_deviation():
    torch.manual_seed(0)
    model = small_model(initializer_range=0.02, hidden_size=256, intermediate_size=256)
    gates = model.model.layers[0]
    assert abs(float(gates.self_attn.q_proj.weight.std()) - 0.02) < 1e-3
    assert abs(float(model.lm_head.weight.std()) - 0.02) < 1e-3
    assert torch.equal(gates.input_layernorm.weight, torch.ones(256))
    assert float(model.model.embed_tokens.weight[1:].std()) > 0.018
    assert not model.model.embed_tokens.weight[0].any()  # pad_token_id 0
