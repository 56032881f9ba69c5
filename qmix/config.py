"""MixtralConfig: every number that shapes the model, read strictly from `config.json`.

Field names and defaults are those of Hugging Face's MixtralConfig. Knows nothing of tensors, or of
files other than `config.json`; what a value may be is in `config_rules`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from qmix import config_rules, strict_json
from qmix.errors import ConfigError, UnsupportedError, UsageError
from qmix.files import atomic_file
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve

# Other names of a field, which transformers 4 and 5 use.
_ALIASES = {"torch_dtype": "dtype", "num_experts": "num_local_experts"}


@dataclass(kw_only=True, init=False, repr=False)
class MixtralConfig:
    """The configuration of a Mixtral model.

    Unknown keyword arguments are kept in `extra`, readable as attributes, and written back by
    `to_dict`. Where the released 8x7B differs from a default, the attribute says so.

    A field may be assigned, and is checked then; a model reads it at its next call. Fields that a
    model is built by, such as `num_hidden_layers`, are fixed once one has been built from this
    object; a copy (`replace`, `copy.deepcopy`) is free again.

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
        UsageError: a field is assigned that the built model cannot change.
    """

    model_type: ClassVar[str] = "mixtral"
    is_encoder_decoder: ClassVar[bool] = False
    _built: ClassVar[bool] = False  # an instance's own once a model has been built from it

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
        self._take(kwargs)

    def _take(self, kwargs: Mapping[str, Any]) -> None:
        """Take these values, and the defaults of the others, once all are found valid."""
        values = config_rules.normalised(kwargs)
        known = {f.name: f.default for f in fields(self) if f.name != "extra"}
        extra = {key: values.pop(key) for key in list(values) if key not in known}
        given = set(values)
        merged = {**known, **values}
        if "num_key_value_heads" in given and merged["num_key_value_heads"] is None:
            merged["num_key_value_heads"] = merged["num_attention_heads"]
        config_rules.check_alone(merged)
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
        config_rules.check_together(merged)
        self.__dict__.update(merged, extra=extra)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign one field, or an entry of `extra`.

        Raises:
            ConfigError, UnsupportedError: as the constructor.
            UsageError: a model has been built from this config, and depends on the field.
        """
        self.update({name: value})

    def update(self, changes: Mapping[str, Any]) -> None:
        """Assign several fields, which are checked together.

        Raises:
            ConfigError, UnsupportedError, UsageError: as an assignment; nothing is changed.
        """
        changed = self.replace(**{_ALIASES.get(name, name): changes[name] for name in changes})
        for name, remedy in config_rules.BUILT_IN.items() if self._built else ():
            own, new = getattr(self, name, None), getattr(changed, name, None)
            if own != new:
                raise UsageError(
                    f"a model has been built with {name} {own!r}",
                    where=f"config.{name}",
                    found=repr(new)[:80],
                    remedy=remedy,
                )
        self.__dict__.update(changed.__dict__)

    def mark_built(self) -> None:
        """From now on a model has weights of this config's shapes."""
        self.__dict__["_built"] = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {name: value for name, value in self.__dict__.items() if name != "_built"}

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}

    def __repr__(self) -> str:
        return f"MixtralConfig {json.dumps(self.to_dict(), indent=2, default=repr)}"

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra and not name.startswith("__"):  # copy and pickle look for such methods
            return extra[name]
        if name in _ALIASES:
            return getattr(self, _ALIASES[name])
        raise AttributeError(f"MixtralConfig has no field {name!r}")

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary embedding, as transformers 5 describes it."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

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
            raise config_rules.wrong(
                "absurd value", "num_labels", f"an integer from 1 to {1 << 22}", labels
            )
        return labels

    def __hash__(self) -> int:
        return hash(self.to_json())

    def replace(self, **changes: Any) -> "MixtralConfig":
        """A copy with some fields changed, checked like a new one."""
        values = self._fields()
        if ("hidden_size" in changes or "num_attention_heads" in changes) and (
            self.head_dim * self.num_attention_heads == self.hidden_size
        ):
            values["head_dim"] = None
        if "rope_parameters" in changes:
            del values["rope_theta"]
        extra = changes.pop("extra", self.extra)
        return MixtralConfig(**{**values, **extra, **changes})

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
    def from_pretrained(cls, directory: str | Path, **options: Any) -> "MixtralConfig":
        """Read the `config.json` of a checkpoint: a directory, or a name of the hub.

        Args:
            options: of the hub: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            CheckpointError: the file is missing or damaged, or a value is wrong.
            UsageError: another option.
        """
        hub = HubOptions.taken(options)
        if options:
            raise UsageError(f"from_pretrained has no option {next(iter(options))!r}")
        path = resolve(directory, need="config", options=hub) / "config.json"
        return cls.from_dict(strict_json.read(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The document of a `config.json`, spelled so that transformers 4 and 5 both read it."""
        values = self._fields()
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

    to_json_string = to_json  # its name in transformers

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` into `directory`, which is created if necessary.

        Raises:
            WriteError: the directory or the file cannot be written.
        """
        strict_json.write(atomic_file.made_folder(directory) / "config.json", self.to_dict())
