"""model.config and model.generation_config may be assigned: checked then, read at the next call."""

import copy
import json
import pickle

import pytest
import torch

import qmix
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ConfigError, QmixError, UnsupportedError, UsageError
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import ids, small_config, small_model


def test_what_tutorials_assign_is_taken():
    model = small_model(num_hidden_layers=1)
    model.config.use_cache = False
    assert model(ids(4)).past_key_values is None
    model.config.pad_token_id = 5
    model.config.pretraining_tp = 1
    assert model.config.pretraining_tp == 1
    assert model.config.to_dict()["pad_token_id"] == 5
    model.config.output_router_logits = True
    assert model(ids(4)).router_logits is not None
    model.config.return_dict = False
    assert isinstance(model(ids(4)), tuple)
    model.config.torch_dtype = None
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 2
    assert model.generation_config.pad_id == 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_experts_per_tok", 3), ("sliding_window", 3), ("rope_theta", 100.0)],
)
def test_a_running_model_reads_the_config_at_each_call(name, value):
    model, x = small_model(), ids(12)
    expected = MixtralForCausalLM(small_config(**{name: value})).eval()
    expected.load_state_dict(model.state_dict())
    before = model(x).logits
    setattr(model.config, name, value)
    assert torch.equal(model(x).logits, expected(x).logits)
    assert not torch.equal(model(x).logits, before)
    generated = model.generate(x, max_new_tokens=4)
    assert torch.equal(generated, expected.generate(x, max_new_tokens=4))


@torch.no_grad()
def test_the_compiled_step_of_a_4_bit_model_reads_it_too(tiny_nf4):
    model = MixtralForCausalLM.from_pretrained(tiny_nf4, device="cpu", dtype="bfloat16")
    prompt = torch.tensor([[1, 5, 6, 7]])
    model.generate(prompt, max_new_tokens=3)
    model.config.num_experts_per_tok = 1
    again = MixtralForCausalLM.from_pretrained(
        tiny_nf4, device="cpu", dtype="bfloat16", num_experts_per_tok=1
    )
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    new, expected = model.generate(prompt, **options), again.generate(prompt, **options)
    assert torch.equal(new.sequences, expected.sequences)
    assert all(map(torch.equal, new.logits, expected.logits))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_hidden_layers", 5, UsageError),
        ("vocab_size", 5, UsageError),
        ("num_experts", 4, UsageError),
        ("tie_word_embeddings", True, UsageError),
        ("id2label", {0: "a", 1: "b", 2: "c"}, UsageError),
        ("_attn_implementation", "eager", UsageError),
        ("num_experts_per_tok", 9, ConfigError),
        ("use_cache", "no", ConfigError),
        ("pad_token_id", 1.5, ConfigError),
        ("rope_scaling", {"type": "linear", "factor": 2}, UnsupportedError),
    ],
)
def test_what_a_built_model_cannot_change_is_refused_and_nothing_changes(name, value, error):
    model = small_model(num_hidden_layers=1)
    before = model.config.to_json()
    found = {"id2label": "num_labels", "num_experts": "num_local_experts"}.get(name, name)
    with pytest.raises(error, match=found):
        setattr(model.config, name, value)
    assert model.config.to_json() == before


def test_a_config_without_a_model_and_every_copy_are_free():
    config = small_config()
    config.num_hidden_layers = 2
    config.num_experts = 4
    model = MixtralForCausalLM(config)
    assert model.config is config
    assert (len(model.model.layers), len(model.model.layers[0].block_sparse_moe.experts)) == (2, 4)
    config.num_hidden_layers = 2  # as it is
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.num_hidden_layers = 3
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.config is again.model.config is not model.config
        with pytest.raises(UsageError, match="num_hidden_layers"):
            again.config.num_hidden_layers = 3


def test_several_fields_are_checked_together():
    config = small_config()
    config.update({"num_local_experts": 1, "num_experts_per_tok": 1})
    config.update({"hidden_size": 32, "num_attention_heads": 4})
    assert config.head_dim == 8
    config.rope_parameters = {"rope_theta": 7.0, "rope_type": "default"}
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 7.0
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        config.num_experts_per_tok = 2
    assert json.loads(str(config).removeprefix("MixtralConfig ")) == config.to_dict()
    assert MixtralConfig(dtype="float16").torch_dtype == "float16"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 2),
        ("pad_token_id", "2"),
        ("num_beams", 4),
        ("tempreature", 1),
    ],
)
def test_a_generation_config_refuses_what_is_out_of_range(name, value):
    config = GenerationConfig(temperature=0.5)
    with pytest.raises(UsageError, match=name):
        setattr(config, name, value)
    assert config == GenerationConfig(temperature=0.5)
    config.output_scores = True  # what goes with it may come later
    with pytest.raises(UsageError, match="output_scores"):
        small_model(num_hidden_layers=1).generate(ids(2), generation_config=config)


@pytest.fixture
def folder(tmp_path):
    small_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")

    def write(**document):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(document))
        return tmp_path / "model"

    return write


def test_the_checkpoints_generation_config_is_honoured(folder):
    stated = {
        "do_sample": True, "temperature": 0.2, "top_k": 7, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "max_new_tokens": 3, "eos_token_id": [2, 5], "pad_token_id": 0,
    }  # fmt: skip
    model = MixtralForCausalLM.from_pretrained(folder(transformers_version="5", **stated))
    assert model.generation_config.to_dict().items() >= stated.items()
    sampling = model.generation_config.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.2, 7, 0.9)
    drawn = model.generate(ids(3), seed=3, eos_token_id=-1)
    assert drawn.shape[1] == 6
    assert torch.equal(
        drawn, model.generate(ids(3), GenerationConfig(seed=3, eos_token_id=-1, top_k=7))
    )
    greedy = model.generate(ids(3), do_sample=False, repetition_penalty=1.0, eos_token_id=-1)
    assert torch.equal(greedy, small_model(num_hidden_layers=1).generate(ids(3), max_new_tokens=3))


def test_what_is_unknown_there_is_named_and_what_is_damaged_refused(folder):
    with pytest.warns(UserWarning, match="num_beams, typical_p: qmix does not have this"):
        model = MixtralForCausalLM.from_pretrained(folder(num_beams=4, typical_p=0.2, max_length=9))
    assert model.generate(ids(4)).shape[1] == 9
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature: out of range"):
        MixtralForCausalLM.from_pretrained(folder(temperature="hot"))
    model = MixtralForCausalLM.from_pretrained(folder(top_k=None, use_cache=False, min_length=0))
    assert model.generation_config.sampling.top_k == 0
    assert model.generation_config.use_cache


def test_every_error_of_an_assignment_is_the_projects_own():
    config = qmix.MixtralConfig()
    for name, value in {"hidden_size": "4", "eos_token_id": [None], "hidden_act": "tanh"}.items():
        with pytest.raises(QmixError, match=name):
            setattr(config, name, value)


def test_a_generation_config_is_read_updated_and_saved_alone(folder, tmp_path):
    config = GenerationConfig.from_pretrained(folder(top_p=0.9, eos_token_id=5), max_new_tokens=4)
    config.pad_token_id = config.eos_token_id
    config.update(do_sample=True, temperature=0.5)
    config.save_pretrained(tmp_path / "own")
    assert GenerationConfig.from_pretrained(tmp_path / "own") == config
    model = MixtralForCausalLM.from_pretrained(folder())
    model.generation_config = config
    assert model.generate(ids(3), eos_token_id=-1).shape[1] == 7
    with pytest.raises(UsageError, match="temperature"):
        config.update(top_p=0.1, temperature=-1)
    assert config.top_p == 0.9
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_saved_model_keeps_what_was_stated(folder, tmp_path):
    model = MixtralForCausalLM.from_pretrained(folder(temperature=0.3, eos_token_id=[5, 7]))
    model.generation_config.top_p = 0.5
    model.save_pretrained(tmp_path / "saved")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config == model.generation_config
    small_model(num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
