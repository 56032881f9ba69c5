"""MixtralConfig: every number that shapes the model, read strictly from `config.json`.

Field names and defaults are those of Hugging Face's MixtralConfig. Knows nothing of tensors, or of
files other than `config.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import ConfigError, UnsupportedError
from qmix.files import atomic_file
from qmix.hub.source import resolve

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


@dataclass(frozen=True, kw_only=True, init=False)
class MixtralConfig:
    """The configuration of a Mixtral model.

    Unknown keyword arguments are kept in `extra`, readable as attributes, and written back by
    `to_dict`. Where the released 8x7B differs from a default, the attribute says so.

    Attributes:
        num_key_value_heads: number of key-value heads; None means one per attention head.
        head_dim: None means `hidden_size // num_attention_heads`.
        hidden_act: silu (swish), gelu, gelu_new, gelu_pytorch_tanh or relu, or a function of one of
            these names.
        max_position_embeddings: exceeding it gives a warning, not an error; 32768 in the 8x7B.
        initializer_range: standard deviation of new weights, which are normal and not truncated.
        sliding_window: number of keys that a query sees, itself included; None is full attention,
            as in the 8x7B.
        rope_theta: also accepted where transformers 5 writes it, in `rope_parameters`.
        num_experts_per_tok: the k of the router's top-k.
        output_router_logits: whether forward returns raw router logits and the auxiliary loss by
            default.
        router_aux_loss_coef: weight of the auxiliary loss in the total; 0.02 in the 8x7B.
        router_jitter_noise: in training, the router's inputs are scaled by up to this much.
        dtype: of the checkpoint's floating tensors; `torch_dtype` in transformers 4.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message names the field.
        UnsupportedError: a feature that qmix does not have (RoPE scaling, another architecture).
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = 1e6
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, /, **kwargs: Any) -> None:
        values = _normalise(kwargs)
        known = {f.name: f.default for f in fields(self) if f.name != "extra"}
        extra = {key: values.pop(key) for key in list(values) if key not in known}
        given = set(values)
        merged = {**known, **values}
        if "num_key_value_heads" in given and merged["num_key_value_heads"] is None:
            merged["num_key_value_heads"] = merged["num_attention_heads"]
        _check(merged)
        if merged.get("head_dim") is None or "head_dim" not in given:
            hidden, heads = merged["hidden_size"], merged["num_attention_heads"]
            if hidden % heads:
                raise ConfigError(
                    "hidden_size is not divisible by num_attention_heads",
                    where="config.hidden_size",
                    expected=f"a multiple of {heads}",
                    found=hidden,
                    remedy="Give head_dim if this is intended.",
                )
            merged["head_dim"] = hidden // heads
        if isinstance(merged["eos_token_id"], list):
            merged["eos_token_id"] = tuple(merged["eos_token_id"])
        _check_together(merged)
        for name, value in merged.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "extra", extra)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra and not name.startswith("__"):  # copy and pickle look for such methods
            return extra[name]
        raise AttributeError(f"MixtralConfig has no field {name!r}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence ids; empty if there is none."""
        if self.eos_token_id is None:
            return ()
        ids = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        return tuple(index for index in ids if index >= 0)

    @property
    def num_labels(self) -> int:
        """Number of a classifier's classes: `num_labels`, else the length of `id2label`, else 2."""
        names = self.extra.get("id2label")
        labels = self.extra.get("num_labels", len(names) if isinstance(names, Mapping) else 2)
        if type(labels) is not int or not 1 <= labels <= 1 << 22:
            raise _wrong("absurd value", "num_labels", f"an integer from 1 to {1 << 22}", labels)
        return labels

    def __hash__(self) -> int:
        return hash(self.to_json())

    def replace(self, **changes: Any) -> "MixtralConfig":
        """A copy with some fields changed, checked like a new one."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if ("hidden_size" in changes or "num_attention_heads" in changes) and (
            self.head_dim * self.num_attention_heads == self.hidden_size
        ):
            values["head_dim"] = None
        return MixtralConfig(**{**values, **self.extra, **changes})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, where: str = "config") -> "MixtralConfig":
        """Read the document of a `config.json`, as transformers 4 or 5 writes it.

        Raises:
            ConfigError, UnsupportedError: as the constructor, and for another model_type; the
                message starts with `where`.
        """
        model_type = document.get("model_type", "mixtral")
        if model_type != "mixtral":
            raise UnsupportedError(
                "not a Mixtral model",
                where=f"{where}: model_type",
                expected="'mixtral'",
                found=repr(model_type),
                remedy="qmix runs Mixtral checkpoints only.",
            )
        try:
            return cls(**{key: value for key, value in document.items() if key != "model_type"})
        except (ConfigError, UnsupportedError) as error:
            field = (error.where or "").removeprefix("config.")
            raise error.at(f"{where}: {field}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "MixtralConfig":
        """Read the `config.json` of a checkpoint directory.

        Raises:
            CheckpointError: the file is missing or damaged, or a value is wrong.
        """
        path = resolve(directory, need="config") / "config.json"
        return cls.from_dict(strict_json.read(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The document of a `config.json`, spelled so that transformers 4 and 5 both read it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        dtype = values.pop("dtype")
        quantization = values.pop("quantization_config")
        if isinstance(values["eos_token_id"], tuple):
            values["eos_token_id"] = list(values["eos_token_id"])
        document = {"model_type": "mixtral", **self.extra, **values}
        document.setdefault("architectures", ["MixtralForCausalLM"])
        document.pop("attn_implementation", None)  # a choice of this machine, not of the model
        if dtype is not None:
            document["torch_dtype"] = dtype
        if quantization is not None:
            document["quantization_config"] = dict(quantization)
        return dict(sorted(document.items()))

    def to_json(self) -> str:
        """The text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True) + "\n"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` into `directory`, which is created if necessary.

        Raises:
            WriteError: the directory or the file cannot be written.
        """
        strict_json.write(atomic_file.made_folder(directory) / "config.json", self.to_dict())


def _normalise(kwargs: Mapping[str, Any]) -> dict[str, Any]:
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
        raise _wrong("wrong type", "attn_implementation", "a name or null", attention)
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


def _wrong(what: str, name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(what, where=f"config.{name}", expected=expected, found=repr(value)[:80])


def _check(values: Mapping[str, Any]) -> None:
    """Refuse a value that is wrong on its own."""
    _check_numbers(values)
    for name in ("use_cache", "tie_word_embeddings", "output_router_logits"):
        if not isinstance(values[name], bool):
            raise _wrong("wrong type", name, "true or false", values[name])
    window = values["sliding_window"]
    if window is not None and (not _is_int(window) or window < 1):
        raise _wrong(
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
        raise _wrong("wrong type", "quantization_config", "an object or null", quantization)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, (low, high) in _INT_RANGES.items():
        value = values[name]
        if name == "head_dim" and value is None:
            continue
        if not _is_int(value) or not low <= value <= high:
            raise _wrong("absurd value", name, f"an integer from {low} to {high}", value)
    for name, (least, most) in _FLOAT_RANGES.items():
        value = values[name]
        number = _is_int(value) or isinstance(value, float)
        if not number or not least <= value <= most:  # no NaN is in a range
            raise _wrong("absurd value", name, f"a number from {least:g} to {most:g}", value)


def _check_tokens(values: Mapping[str, Any]) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = values[name]
        several = name == "eos_token_id" and isinstance(value, (list, tuple))
        for index in value if several else [value]:
            if index is None and not several:
                continue
            if not _is_int(index) or not -1 <= index < 1 << 31:
                raise _wrong("wrong type", name, "a token id (-1: none) or null", value)


def _check_together(values: Mapping[str, Any]) -> None:
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
