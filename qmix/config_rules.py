"""What a field of `config.json` may hold: ranges, spellings, and what contradicts what.

Knows no file and no model; the values are MixtralConfig's, by name.
"""

from collections.abc import Mapping
from typing import Any

from qmix.errors import ConfigError, UnsupportedError

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
DTYPES = ("float32", "float16", "bfloat16")

MAX_POSITIONS = 1 << 28  # the largest max_position_embeddings

# The accepted ranges reach an order of magnitude above any Mixtral, far below what overflows.
_INT_RANGES = {
    "vocab_size": (2, 1 << 22),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 4096),
    "max_position_embeddings": (1, MAX_POSITIONS),
    "num_local_experts": (1, 1024),
    "num_experts_per_tok": (1, 1024),
}
_FLOAT_RANGES = {
    "initializer_range": (0.0, 1e3),
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1e-3, 1e15),
    "attention_dropout": (0.0, 1.0),
    "router_aux_loss_coef": (0.0, 1e6),
    "router_jitter_noise": (0.0, 1.0),
}

# Fields for which null in config.json means the default.
_NULL_MEANS_DEFAULT = (
    "rope_theta",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "output_router_logits",
    "tie_word_embeddings",
)

_FROM_SCRATCH = (
    "Make another model: MixtralForCausalLM(config.replace(...)) for one with new weights."
)
_TO_LOAD = "Give it to from_pretrained, which builds the model."
# Fields that a built model cannot change any more, each with what to do instead.
BUILT_IN = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts"),
            *("hidden_act", "rms_norm_eps", "tie_word_embeddings"),
        ),
        _FROM_SCRATCH,
    ),
    "num_labels": _TO_LOAD,
    "attn_implementation": "Call model.set_attn_implementation.",
    "_attn_implementation": "Call model.set_attn_implementation.",
    "dtype": "Call model.to with another dtype, or load it with dtype=.",
    "quantization_config": "Run qmix quantize, or load the model with quantization_config=.",
}


def normalised(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Unify the spellings of transformers 4 and 5."""
    values = dict(kwargs)
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping):
            raise ConfigError(
                "wrong type", where="config.rope_parameters", expected="an object", found=repr(rope)
            )
        theta = rope.get("rope_theta")
        if theta is not None and values.setdefault("rope_theta", theta) != theta:
            raise ConfigError(
                "rope_theta is given twice and differs",
                where="config.rope_parameters",
                expected=values["rope_theta"],
                found=theta,
            )
        _refuse_scaling("rope_parameters", rope)
    scaling = values.pop("rope_scaling", None)
    if scaling is not None:
        _refuse_scaling("rope_scaling", scaling)
    _alias(values, "num_experts", "num_local_experts")
    _alias(values, "torch_dtype", "dtype")
    dtype = values.get("dtype")
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    act = values.get("hidden_act")
    if callable(act) and hasattr(act, "__name__"):
        values["hidden_act"] = act.__name__
    attention = values.get("attn_implementation")
    if attention is not None and not isinstance(attention, str):
        raise wrong("wrong type", "attn_implementation", "a name or null", attention)
    for name in _NULL_MEANS_DEFAULT:
        if values.get(name, 0) is None:
            del values[name]
    if values.get("partial_rotary_factor", 1) not in (None, 1):
        raise UnsupportedError(
            "partial rotary embedding is not supported",
            where="config.partial_rotary_factor",
            expected="1 or null",
            found=repr(values["partial_rotary_factor"])[:80],
        )
    return values


def _alias(values: dict[str, Any], alias: str, name: str) -> None:
    if alias not in values:
        return
    value = values.pop(alias)
    if values.get(name, value) is None:
        values.pop(name, None)
    if value is not None and values.setdefault(name, value) != value:
        raise ConfigError(
            f"{alias} and {name} differ",
            where=f"config.{alias}",
            expected=values[name],
            found=value,
        )


def _refuse_scaling(name: str, rope: Any) -> None:
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    if kind not in (None, "default"):
        raise UnsupportedError(
            "RoPE scaling is not supported",
            where=f"config.{name}",
            expected="'default' or null",
            found=repr(kind),
            remedy="No released Mixtral uses it; remove the entry to run without scaling.",
        )


def wrong(what: str, name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(what, where=f"config.{name}", expected=expected, found=repr(value)[:80])


def check_alone(values: Mapping[str, Any]) -> None:
    """Refuse a value that is wrong on its own."""
    _check_numbers(values)
    for name in ("use_cache", "tie_word_embeddings", "output_router_logits"):
        if not isinstance(values[name], bool):
            raise wrong("wrong type", name, "true or false", values[name])
    window = values["sliding_window"]
    if window is not None and (not _is_int(window) or window < 1):
        raise wrong(
            "absurd value",
            "sliding_window",
            "null (full attention) or an integer of at least 1",
            window,
        )
    _check_tokens(values)
    dtype, quantization = values["dtype"], values["quantization_config"]
    for what, name, value, known in (
        ("unknown activation", "hidden_act", values["hidden_act"], ACTIVATIONS),
        ("unknown dtype", "torch_dtype", dtype, (None, *DTYPES)),
    ):
        if value not in known:
            raise UnsupportedError(
                what,
                where=f"config.{name}",
                expected="one of " + ", ".join(filter(None, known)),
                found=repr(value)[:80],
            )
    if quantization is not None and not isinstance(quantization, Mapping):
        raise wrong("wrong type", "quantization_config", "an object or null", quantization)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, (low, high) in _INT_RANGES.items():
        value = values[name]
        if name == "head_dim" and value is None:
            continue
        if not _is_int(value) or not low <= value <= high:
            raise wrong("absurd value", name, f"an integer from {low} to {high}", value)
    for name, (least, most) in _FLOAT_RANGES.items():
        value = values[name]
        number = _is_int(value) or isinstance(value, float)
        if not number or not least <= value <= most:  # no NaN is in a range
            raise wrong("absurd value", name, f"a number from {least:g} to {most:g}", value)


def _check_tokens(values: Mapping[str, Any]) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = values[name]
        several = name == "eos_token_id" and isinstance(value, (list, tuple))
        for index in value if several else [value]:
            if index is None and not several:
                continue
            if not _is_int(index) or not -1 <= index < 1 << 31:
                raise wrong("wrong type", name, "a token id (-1: none) or null", value)


def check_together(values: Mapping[str, Any]) -> None:
    """Refuse values that contradict each other."""
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise ConfigError(
            "num_attention_heads is not a multiple of num_key_value_heads",
            where="config.num_key_value_heads",
            expected=f"a divisor of {heads}",
            found=kv_heads,
        )
    if values["head_dim"] % 2:
        raise ConfigError(
            "head_dim is odd, and RoPE rotates pairs",
            where="config.head_dim",
            expected="an even number",
            found=values["head_dim"],
        )
    if values["num_experts_per_tok"] > values["num_local_experts"]:
        raise ConfigError(
            "more experts per token than experts",
            where="config.num_experts_per_tok",
            expected=f"at most {values['num_local_experts']}",
            found=values["num_experts_per_tok"],
        )
