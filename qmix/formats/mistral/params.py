"""Mistral's `params.json` in either spelling, as a MixtralConfig. Knows nothing of tensors."""

from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import ConfigError

PARAMS = "params.json"

# Field of MixtralConfig -> its spellings in params.json: the hub converter's, mistral-inference's.
_FIELDS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "rope_theta": ("rope_theta",),
    "num_local_experts": ("num_local_experts", "moe.num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe.num_experts_per_tok"),
}
# Mixtral's values if params.json has none: the first release has no rope_theta and means 1e6.
_DEFAULTS = {"head_dim": None, "rope_theta": 1e6, "num_experts_per_tok": 2}
_MAX_POSITIONS = 32768


def read(path: Path) -> tuple[MixtralConfig, tuple[str, ...]]:
    """The config that a params.json describes, and the names of the entries that are ignored.

    `sliding_window` is always ignored: Mixtral attends to everything, whatever the file says.

    Raises:
        ConfigError: an entry is missing, has a wrong type or is out of range; the file's name of it
            is given.
    """
    document = strict_json.read(path)
    moe = document.pop("moe", None)
    if moe is not None and not isinstance(moe, dict):
        raise ConfigError(
            "wrong type", where=f"{path}: moe", expected="an object", found=repr(moe)[:80]
        )
    document.update({f"moe.{key}": value for key, value in (moe or {}).items()})
    values: dict[str, Any] = {"max_position_embeddings": _MAX_POSITIONS}
    spelling_of = {}
    for field, spellings in _FIELDS.items():
        given = [name for name in spellings if document.get(name) is not None]
        if not given and field not in _DEFAULTS:
            raise ConfigError(
                "missing",
                where=f"{path}: {spellings[-1]}",
                expected="every size of a Mixtral",
                remedy="qmix converts Mixtral checkpoints only.",
            )
        values[field] = document[given[0]] if given else _DEFAULTS[field]
        spelling_of[field] = given[-1] if given else field
        for name in given[1:]:
            if document[name] != values[field]:
                raise ConfigError(
                    f"contradicts {given[0]}",
                    where=f"{path}: {name}",
                    expected=values[field],
                    found=repr(document[name])[:80],
                )
    known = {name for spellings in _FIELDS.values() for name in spellings}
    ignored = sorted(name for name, value in document.items() if value and name not in known)
    try:
        return MixtralConfig(**values), tuple(ignored)
    except ConfigError as error:
        field = (error.where or "").removeprefix("config.")
        raise error.at(f"{path}: {spelling_of.get(field, field)}") from None
