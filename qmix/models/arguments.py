"""from_pretrained's arguments in transformers' words, brought into qmix's own.

Knows no checkpoint and no modules.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qmix.config import MixtralConfig
from qmix.config_rules import BUILT_IN
from qmix.errors import UnsupportedError, UsageError, wrong_type
from qmix.models.options import LoadOptions, parse_dtype
from qmix.planning.byte_sizes import parse_size

# Fields of the config that a user may set while loading, because no shape depends on them.
OVERRIDES = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "num_experts_per_tok",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "rope_theta",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sliding_window",
    "use_cache",
)

# Options of transformers that change nothing here: files are read as safetensors, without code, one
# tensor at a time whatever is asked.
_WITHOUT_EFFECT = (
    "cache_dir",
    "code_revision",
    "force_download",
    "ignore_mismatched_sizes",
    "local_files_only",
    "low_cpu_mem_usage",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "resume_download",
    "revision",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_flash_attention_2",
    "use_safetensors",
    "weights_only",
    "_fast_init",
)
# Options that are taken with the value that changes nothing.
_NEUTRAL: Mapping[str, object] = {
    **dict.fromkeys(("from_flax", "from_tf", "output_loading_info", "use_kernels"), False),
    **dict.fromkeys(("device_mesh", "gguf_file", "state_dict", "tp_plan", "variant"), None),
    "subfolder": "",
}
# Options of save_pretrained that change nothing here.
_SAVING = ("is_main_process", "token", "variant", "save_peft_format", "commit_message", "private")
_ONE_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")


def config_changes(
    options: Mapping[str, Any], attn_implementation: str | None = None
) -> dict[str, Any]:
    """The options that change the config, without those that have no effect; and the attention.

    Raises:
        UsageError: an unknown option.
    """
    for name, value in options.items():
        if name in OVERRIDES or name in _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL or value not in (None, False, "", _NEUTRAL[name]):
            raise UsageError(
                f"from_pretrained has no option {name!r}"
                + (f" but {_NEUTRAL[name]!r}" if name in _NEUTRAL else ""),
                expected="torch_dtype, dtype, device, device_map, max_memory, attn_implementation, "
                "vram, ram, max_context, backend, kv, load_in_4bit, quantization_config, config, "
                + ", ".join(OVERRIDES),
            )
    if options.get("trust_remote_code"):
        say_that_no_code_is_run()
    changes = {name: value for name, value in options.items() if name in OVERRIDES}
    if options.get("use_flash_attention_2"):  # transformers 4's word
        changes["attn_implementation"] = "flash_attention_2"
    if attn_implementation is not None:
        changes["attn_implementation"] = attn_implementation
    return changes


def say_that_no_code_is_run() -> None:
    """Warn that trust_remote_code is not needed; Python shows the same warning once."""
    warnings.warn(
        "trust_remote_code has no effect: qmix never runs code of a checkpoint", stacklevel=4
    )


def of_config(config: object, own: MixtralConfig) -> dict[str, Any]:
    """What `config=` changes of a checkpoint's own config.

    Raises:
        UsageError: it is no config, or describes weights of other shapes.
    """
    if not isinstance(config, MixtralConfig):
        raise wrong_type("config", "a qmix.MixtralConfig", config)
    for name in (name for name in BUILT_IN if name in own.__dict__):
        mine, theirs = getattr(own, name), getattr(config, name)
        if mine != theirs and name not in ("dtype", "quantization_config"):
            raise UsageError(
                f"the checkpoint has another {name}",
                where=f"config.{name}",
                expected=repr(mine)[:80],
                found=repr(theirs)[:80],
            )
    names = [name for name in OVERRIDES if name in config.__dict__ or name in config.extra]
    return {name: getattr(config, name) for name in names}


def load_options(options: LoadOptions | None, given: dict[str, Any]) -> LoadOptions:
    """The options of a load, given as an object or as from_pretrained's arguments.

    Raises:
        UsageError: both, or a value that is none of an argument's.
        ResourceError: a CUDA device is asked for and none is available.
    """
    if options is not None:
        _check_alone(options, list(given.values()))
        return options
    vram, ram = given["vram"], given["ram"]
    if given["max_memory"] is not None:
        if vram is not None or ram is not None:
            raise UsageError("give either max_memory, or vram and ram", where="max_memory")
        vram, ram = _budgets(given["max_memory"])
    return LoadOptions(
        dtype=agreed_dtype(given["torch_dtype"], given["dtype"]),
        device=_placed(given["device"], given["device_map"]),
        vram=vram,
        ram=ram,
        max_context=given["max_context"],
        backend=given["backend"],
        kv=given["kv"],
    )


def shard_bytes(options: dict[str, Any], default: int) -> int:
    """The largest shard that save_pretrained may write.

    Raises:
        UsageError: an unknown option, or no size.
        UnsupportedError: an option that uploads, or that writes pickles.
    """
    for name, value in options.items():
        if name in ("push_to_hub", "repo_id") and value:
            raise no_upload(name)
        if name == "safe_serialization" and value is False:
            raise UnsupportedError("qmix writes safetensors only", where=name)
        if name not in (*_SAVING, "push_to_hub", "repo_id", "safe_serialization", "max_shard_size"):
            raise UsageError(f"save_pretrained has no option {name!r}", expected="max_shard_size")
    size = options.get("max_shard_size")
    return default if size is None else parse_size(size, where="max_shard_size", least=1 << 16)


def no_upload(where: str) -> UnsupportedError:
    """The refusal to upload a model."""
    return UnsupportedError(
        "qmix uploads nothing",
        where=where,
        remedy="Save the model, and run: hf upload ORG/NAME DIRECTORY",
    )


def _budgets(max_memory: object) -> tuple[int | str | None, int | str | None]:
    """vram and ram of accelerate's mapping: {0: "20GiB", "cpu": "60GiB"}."""
    expected = "{0: '20GiB', 'cpu': '60GiB'}, with one GPU"
    if not isinstance(max_memory, Mapping):
        raise UsageError(
            "wrong type", where="max_memory", expected=expected, found=repr(max_memory)[:80]
        )
    gpus = [key for key in max_memory if key not in ("cpu", "disk")]
    if len(gpus) > 1 or not all(type(key) is int or str(key).startswith("cuda") for key in gpus):
        raise UsageError(
            "the model cannot be split over devices",
            where="max_memory",
            expected=expected,
            found=repr(max_memory)[:80],
        )
    return (max_memory[gpus[0]] if gpus else None), max_memory.get("cpu")


def _placed(device: torch.device | str | None, device_map: object) -> torch.device | str | None:
    """The device that `device` or `device_map` names; None: the default device."""
    if device_map is None:
        return device
    if device is not None:
        raise UsageError("give either device or device_map", where="device_map")
    place = device_map
    if isinstance(place, Mapping):
        place = next(iter(place.values())) if len(set(place.values())) == 1 else repr(place)
    if isinstance(place, str) and place in _ONE_DEVICE:
        return None
    if isinstance(place, int) and not isinstance(place, bool):
        return f"cuda:{place}"
    if isinstance(place, torch.device) or str(place).partition(":")[0] in ("cpu", "cuda"):
        return torch.device(place) if isinstance(place, torch.device) else str(place)
    raise UsageError(
        "the model cannot be split over devices",
        where="device_map",
        expected="'auto', a device, or {'': device}",
        found=repr(device_map)[:80],
    )


def _check_alone(load_options: object, fields: Sequence[object]) -> None:
    """Raise unless `load_options` is LoadOptions and none of its fields is given beside it."""
    if any(value is not None for value in fields):
        raise UsageError("give either load_options or its fields", where="load_options")
    if not isinstance(load_options, LoadOptions):
        raise wrong_type("load_options", "LoadOptions", load_options)


def agreed_dtype(
    torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """The dtype that either of the two spellings names."""
    first, second = parse_dtype(torch_dtype), parse_dtype(dtype)
    if first is not None and second is not None and first != second:
        raise UsageError(
            "torch_dtype and dtype differ", where="dtype", expected=first, found=second
        )
    return first or second
