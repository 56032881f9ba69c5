"""The config of a Mixtral from a GGUF file's metadata, and back. Knows nothing of tensors' data.

llama.cpp stores a Mixtral as the architecture "llama" with experts (llama.cpp, src/llama-arch.cpp
and convert_hf_to_gguf.py). What it would compute otherwise than a Mixtral is refused by key.
"""

from array import array
from collections.abc import Mapping
from typing import Any

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ConfigError, UnsupportedError
from qmix.gguf.files import GGUFModel
from qmix.gguf.header_fields import Value

ARCHITECTURE = "general.architecture"
_LLAMA = "llama"
_TOKENS = "tokenizer.ggml.tokens"

# Field of MixtralConfig -> its key without the architecture.
_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
}
# What llama.cpp takes if a key is missing; other keys are required.
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_theta": 10000.0,
    "vocab_size": None,
    "sliding_window": None,
}
_SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# Further tokens that end a turn or a text.
_FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# Keys that change what is computed -> the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False, True),  # llama.cpp looks at it for GPT-NeoX only
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # softmax
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "pooling_type": (0,),
}
_EQUAL_HEADS = ("attention.value_length", "rope.dimension_count")


def read_config(model: GGUFModel) -> MixtralConfig:
    """The config that the metadata describe; its special ids are the tokenizer's.

    `dtype` is that of the embedding; bfloat16, in which Mixtrals are made, if that is quantized.

    Raises:
        UnsupportedError: no Mixtral, or one that qmix does not compute; the key is named.
        CheckpointError: a key is missing, has a wrong type or contradicts another; it is named.
    """
    metadata, where = model.metadata, str(model.path)
    architecture = metadata.get(ARCHITECTURE)
    experts = metadata.get(_key("expert_count"))
    if architecture != _LLAMA:
        raise _unread(where, ARCHITECTURE, "not a Mixtral", repr(_LLAMA), architecture)
    if experts is None or experts == 0:
        what = "not a Mixtral: the model has no experts"
        raise _unread(where, _key("expert_count"), what, "experts", experts)
    _refuse_other_models(metadata, where)
    values = {field: _value(metadata, where, field) for field in _FIELDS}
    values["vocab_size"] = _vocab_size(metadata, where)
    values["sliding_window"] = values["sliding_window"] or None
    values.update({field: metadata.get(key) for field, key in _SPECIAL_IDS.items()})
    values["eos_token_id"] = _ends(metadata, values["eos_token_id"])
    values["tie_word_embeddings"] = "output.weight" not in model.tensors
    values["dtype"] = _dtype(model)
    try:
        config = MixtralConfig(**values)
    except (ConfigError, UnsupportedError) as error:
        field = (error.where or "").removeprefix("config.")
        key = _SPECIAL_IDS.get(field, _key(_FIELDS.get(field, field)))
        raise error.at(f"{where}: {key}") from None
    for name in _EQUAL_HEADS:
        found = metadata.get(_key(name), config.head_dim)
        if found != config.head_dim:
            what = "heads of unequal or partly rotated width"
            raise _unread(where, _key(name), what, config.head_dim, found)
    return config


def described(config: MixtralConfig) -> dict[str, Value]:
    """The metadata that `read_config` reads, without those of the tokenizer."""
    values: dict[str, Value] = {ARCHITECTURE: _LLAMA}
    for field, name in _FIELDS.items():
        value = getattr(config, field)
        if value is not None:
            values[_key(name)] = value
    values.update({_key(name): config.head_dim for name in _EQUAL_HEADS})
    for name in ("rms_norm_eps", "rope_theta"):  # an integer in some configs
        values[_key(_FIELDS[name])] = float(getattr(config, name))
    return values


def _key(name: str) -> str:
    return f"{_LLAMA}.{name}"


def _unread(where: str, key: str, what: str, expected: object, found: object) -> UnsupportedError:
    return UnsupportedError(
        what,
        where=f"{where}: {key}",
        expected=expected,
        found=repr(found)[:80],
        remedy="qmix runs Mixtral checkpoints only.",
    )


def _refuse_other_models(metadata: Mapping[str, Value], where: str) -> None:
    for name, neutral in _NEUTRAL.items():
        value = metadata.get(_key(name))
        if value is not None and value not in neutral:
            expected = " or ".join(map(repr, neutral))
            what = "asks for what a Mixtral does not compute"
            raise _unread(where, _key(name), what, f"no such key, or {expected}", value)


def _value(metadata: Mapping[str, Value], where: str, field: str) -> Any:
    """One field's value; MixtralConfig checks its type and range."""
    key = _key(_FIELDS[field])
    value = metadata.get(key)
    if isinstance(value, float):
        return _shortest(value)
    if value is not None:
        return value
    if field not in _DEFAULTS:
        raise CheckpointError(
            "missing", where=f"{where}: {key}", remedy="The file's metadata are incomplete."
        )
    return _DEFAULTS[field]


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same float32: 1e-05, not 9.99999974738e-06."""
    digits = (float(f"{value:.{count}g}") for count in range(1, 10))
    return next((short for short in digits if array("f", [short])[0] == value), value)


def _vocab_size(metadata: Mapping[str, Value], where: str) -> Value | None:
    """The size that the metadata state, or the number of tokens."""
    key = _key(_FIELDS["vocab_size"])
    stated, tokens = metadata.get(key), metadata.get(_TOKENS)
    if not isinstance(tokens, tuple):
        if stated is None:
            raise CheckpointError("missing", where=f"{where}: {_TOKENS}", expected="the tokens")
        return stated
    if stated is not None and stated != len(tokens):
        expected = f"{len(tokens)}, the number of {_TOKENS}"
        raise CheckpointError(
            "contradicts the tokens", where=f"{where}: {key}", expected=expected, found=stated
        )
    return len(tokens)


def _ends(metadata: Mapping[str, Value], end: Any) -> Any:
    """The id of the end of a text, with those of other tokens that end one."""
    further = [value for key in _FURTHER_ENDS if type(value := metadata.get(key)) is int]
    if not further or type(end) is not int:
        return end
    return tuple(dict.fromkeys((end, *further)))


def _dtype(model: GGUFModel) -> str:
    _, embedding = model.tensors.get("token_embd.weight", (None, None))
    names = {"F32": "float32", "F16": "float16"}
    return names.get(embedding.type, "bfloat16") if embedding else "bfloat16"
