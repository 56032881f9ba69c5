import copy
import json

import pytest

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ConfigError, QmixError, UnsupportedError, WriteError


def test_defaults_are_the_reference_pages():
    config = MixtralConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 14336)
    assert (config.num_hidden_layers, config.num_attention_heads) == (32, 32)
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)
    assert (config.rope_theta, config.sliding_window, config.tie_word_embeddings) == (
        1e6,
        None,
        False,
    )
    assert (config.num_experts_per_tok, config.num_local_experts) == (2, 8)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)


def test_no_key_value_heads_means_one_per_head():
    assert MixtralConfig(num_key_value_heads=None, num_attention_heads=16).num_key_value_heads == 16


def test_transformers_4_and_5_spellings_give_the_same_config():
    old = {
        "model_type": "mixtral",
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
        "num_local_experts": 4,
    }
    new = {
        "model_type": "mixtral",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "dtype": "bfloat16",
        "num_experts": 4,
    }
    assert MixtralConfig.from_dict(old) == MixtralConfig.from_dict(new)


def test_rope_theta_missing_everywhere_is_a_million():
    assert MixtralConfig(rope_parameters={"rope_type": "default"}).rope_theta == 1e6


def test_unknown_keys_are_kept_and_round_trip(tmp_path):
    config = MixtralConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, zebra=[1, {"a": None}]
    )
    assert config.zebra == [1, {"a": None}]
    config.save_pretrained(tmp_path)
    again = MixtralConfig.from_pretrained(tmp_path)
    assert again.zebra == config.zebra
    assert again.replace(sliding_window=8).zebra == config.zebra
    assert json.loads((tmp_path / "config.json").read_text())["zebra"] == config.zebra


def test_every_field_round_trips(tmp_path):
    config = MixtralConfig(
        vocab_size=99, hidden_size=48, intermediate_size=33, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, hidden_act="gelu",
        max_position_embeddings=77, initializer_range=0.3, rms_norm_eps=1e-3, use_cache=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=[2, 5], tie_word_embeddings=True,
        rope_theta=1e4, sliding_window=9, attention_dropout=0.1, num_experts_per_tok=3,
        num_local_experts=5, output_router_logits=True, router_aux_loss_coef=0.02,
        router_jitter_noise=0.1, dtype="float16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert MixtralConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("hidden_size", 2**63),
        ("hidden_size", 0),
        ("hidden_size", 4095),
        ("vocab_size", 1),
        ("vocab_size", -5),
        ("num_local_experts", 0),
        ("num_local_experts", "8"),
        ("num_experts_per_tok", 9),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 5),
        ("rope_theta", 0),
        ("rope_theta", "1e6"),
        ("rope_theta", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rms_norm_eps", -1e-5),
        ("sliding_window", 0),
        ("sliding_window", -1),
        ("sliding_window", "4096"),
        ("head_dim", 3),
        ("attention_dropout", 2),
        ("use_cache", "yes"),
        ("tie_word_embeddings", 1),
        ("eos_token_id", "</s>"),
        ("pad_token_id", 1.5),
        ("quantization_config", "nf4"),
    ],
)
def test_absurd_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        MixtralConfig(**{field: value})
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "mish"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn"}),
        ("torch_dtype", "int8"),
        ("model_type", "llama"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedError, match=field):
        MixtralConfig.from_dict({field: value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": NaN}',
        '{"hidden_size": 1e999}',
        '{"hidden_size": 64, "hidden_size": 128}',
        "[" * 100_000,
        '{"vocab_size": ' + "9" * 5000 + "}",
    ],
)
def test_bad_json_is_one_clear_error_naming_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MixtralConfig.from_pretrained(tmp_path)


def test_a_missing_or_huge_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        MixtralConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(CheckpointError, match="too large"):
        MixtralConfig.from_pretrained(tmp_path)


def test_errors_are_one_printable_line():
    error = QmixError("bad\nthing", where="a\x1b[31m", found="\u202e", remedy="Stop.")
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert "\u202e" not in str(error)


@pytest.mark.parametrize("value", [["eager"], {}, 1, True])
def test_an_attention_that_is_no_name_is_refused_by_file_and_field(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"attn_implementation": value}))
    with pytest.raises(ConfigError, match=r"config\.json: attn_implementation: wrong type"):
        MixtralConfig.from_pretrained(tmp_path)


def test_a_method_of_python_is_no_field_of_a_config():
    config = MixtralConfig.from_dict({"__deepcopy__": 1, "__getstate__": 2})
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"rope_theta": {10**400}}}', "does not fit a float"),
        ("[1]", "an object"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "64 levels"),
    ],
)
def test_documents_that_could_not_be_written_again_are_refused(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        MixtralConfig.from_pretrained(tmp_path)


def test_saving_onto_a_file_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "out"
    file.touch()
    with pytest.raises(WriteError, match=r"out: cannot be written; found File exists"):
        MixtralConfig().save_pretrained(file)
    assert file.read_bytes() == b""
