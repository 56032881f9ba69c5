"""What the public models share: loading, saving, moving, a cache of their own.

Knows no forward pass and no bits; weights come through qmix.models.load.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError, UsageError
from qmix.experts.store import Store
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve
from qmix.kernels import attention
from qmix.models import load, offload, save
from qmix.models.offload import Tiers
from qmix.models.options import LoadOptions, parse_dtype
from qmix.nn.cache import KVCache
from qmix.nn.decoder import Decoder
from qmix.nn.outputs import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)

# Fields of the config that a user may set while loading, because no shape depends on them.
_OVERRIDES = (
    "attention_dropout",
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

# Options of transformers that change nothing here: files come from a local directory, as
# safetensors, without code, and are read one tensor at a time whatever is asked.
_WITHOUT_EFFECT = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "offload_state_dict",
    "resume_download",
    "revision",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_safetensors",
)

_QUANTIZING = ("load_in_4bit", "load_in_8bit", "quantization_config")


class PreTrainedModel(nn.Module):
    """A model with a config that can be loaded, saved and moved."""

    config: MixtralConfig

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: object = None,
        attn_implementation: str | None = None,
        vram: str | int | None = None,
        ram: str | int | None = None,
        max_context: int | None = None,
        load_options: LoadOptions | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory, dense or 4-bit.

        Args:
            directory: a folder, a GGUF file, or ORG/NAME of the hub, downloaded if need be.
            torch_dtype, dtype: of the activations and dense weights; default: the checkpoint's.
            device: default: the GPU if there is one.
            device_map: the device in transformers' words: "auto", a device, or {"": device}.
            attn_implementation: "eager", "sdpa" (default), "flash_attention_2" or "triton".
            vram, ram: memory to use at most on the GPU and on the host: "16GiB", "16GB" or bytes.
                Experts that do not fit are kept in host memory, or stay in the file and are read
                when the router chooses them; the output is the same. Such a model cannot be trained
                or moved.
            max_context: positions that the budgets leave room for; default: 4096, or the model's.
            load_options: dtype, device, vram, ram and max_context as one object instead.
            options: the fields of HubOptions (`revision`, `token`, ...), and those of the config
                that no shape depends on, such as `sliding_window`,
                `num_experts_per_tok` or `num_labels`. Options of transformers that cannot change
                anything here (`low_cpu_mem_usage`, `use_safetensors`, ...) are accepted.

        Raises:
            CheckpointError: a file is missing, damaged, or its tensors are not the model's.
            UnsupportedError: a layout that qmix does not read, or an attention that is not
                available.
            UsageError: an unknown option, or a value that is none of an option's.
            ResourceError: the model does not fit the budgets, or the memory that is free.
        """
        hub = HubOptions.taken(options)
        changes = _changes(options)
        if attn_implementation is not None:
            changes["attn_implementation"] = attn_implementation
        fields = (torch_dtype, dtype, device, device_map, vram, ram, max_context)
        if load_options is None:
            load_options = LoadOptions(
                dtype=_agreed(torch_dtype, dtype),
                device=_placed(device, device_map),
                vram=vram,
                ram=ram,
                max_context=max_context,
            )
        else:
            _check_alone(load_options, fields)
        folder = resolve(directory, need="weights", options=hub)
        model = cls.from_checkpoint(open_checkpoint(folder), load_options, **changes)
        model.read_generation_config(folder)
        return model

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        options: LoadOptions,
        *,
        tiers: Tiers | None = None,
        **changes: Any,
    ) -> Self:
        """Build a model without storage and fill it, one tensor at a time.

        Args:
            tiers: where experts are kept; default: as planned for the budgets. Parameters are
                frozen unless all experts are on the device.
            changes: fields of the config.

        Raises:
            CheckpointError: a tensor is damaged, or the checkpoint is of a model without this head.
            ResourceError: the model does not fit the budgets, or the memory that is free.
        """
        if tiers is None:
            tiers = offload.plan_tiers(checkpoint, options)
        dtype = options.dtype or checkpoint.dtype
        with torch.device("meta"):
            model = cls(checkpoint.config.replace(**changes))
        load.fill_model(model.checkpoint_modules(), checkpoint, dtype, options.device, tiers)
        if tiers is not None:
            model.requires_grad_(requires_grad=False)
        model.tie_weights()
        model.initialise_missing(options.device, dtype)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise CheckpointError(
                "the checkpoint is of a model without this head",
                where=str(checkpoint.metadata.directory),
                found=f"no {', '.join(missing)}",
                remedy="Load it as MixtralModel.",
            )
        return model.eval()

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """All modules by the names that their tensors have in a checkpoint."""
        return dict(self.named_modules())

    def tie_weights(self) -> None:
        """Share the embedding with the head if there is one and the config says so."""

    def initialise_missing(self, device: torch.device, dtype: torch.dtype) -> None:
        """Initialise the weights that a checkpoint may leave out; by default there are none."""

    def read_generation_config(self, directory: Path) -> None:
        """Take the special ids from generation_config.json, if the model generates."""

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Write config.json and sharded safetensors; dense and 4-bit weights stay as they are.

        Raises:
            UsageError: the directory already holds weights or a config.
            WriteError: a file cannot be written; the directory is as it was.
        """
        config = self.config.replace(architectures=[type(self).__name__])
        save.save(self, config, directory, max_shard_bytes)

    def set_attn_implementation(self, name: str | None) -> None:
        """Choose the attention: "eager", "sdpa", "flash_attention_2" or "triton"; None: "sdpa".

        Raises:
            UsageError: an unknown name.
            UnsupportedError: what it needs is not installed.
        """
        if name is not None and not isinstance(name, str):
            raise UsageError(
                "wrong type",
                where="attn_implementation",
                expected="a name or None",
                found=repr(name)[:80],
            )
        self._decoder.attn_implementation = attention.checked_implementation(name)

    def _returned(self, return_dict: bool | None, output: Output) -> Output | tuple[Any, ...]:
        """The output, or its fields as a tuple if the caller, or else the config, asks for that."""
        default = getattr(self.config, "return_dict", True)
        return output if (default if return_dict is None else return_dict) else output.to_tuple()

    @property
    def _decoder(self) -> Decoder:
        """The model itself, or the decoder below its head."""
        return next(module for module in self.modules() if isinstance(module, Decoder))

    def get_input_embeddings(self) -> nn.Embedding:
        """The module that turns ids (B, S) into embeddings (B, S, D), for `inputs_embeds`."""
        return self._decoder.embed_tokens

    @property
    def store(self) -> Store | None:
        """The store that keeps an offloaded model's experts, with its `statistics()`; else None."""
        return self._decoder.experts_store

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        store = self.store
        if store is not None:  # before anything is moved
            target = fn(torch.empty(0, device=self.device)).device
            if target != self.device:
                raise UsageError(
                    "an offloaded model cannot be moved",
                    where=".to()",
                    expected=self.device,
                    found=target,
                    remedy="Load it again with device=.",
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._decoder.embed_tokens.weight is None:
            self.tie_weights()  # embedding and head were moved one by one
        return self

    def check_process(self) -> None:
        """Raise UnsupportedError where a forked process cannot use the model; see MadeHere."""
        self._decoder.made_here.check(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def new_cache(self, batch: int = 1, capacity: int = 0) -> KVCache:
        """An empty cache for this model, with storage for `capacity` positions.

        Raises:
            UnsupportedError: as Decoder.decode, after a fork.
        """
        self.check_process()
        return KVCache(self.config, batch, dtype=self.dtype, device=self.device, capacity=capacity)


def _changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change the config, without those that have no effect.

    Raises:
        UnsupportedError: an option that quantizes.
        UsageError: an unknown option.
    """
    for name, value in options.items():
        if name in _QUANTIZING and value:
            raise UnsupportedError(
                "qmix does not quantize while loading",
                where=name,
                remedy="Run qmix quantize once, and load what it writes.",
            )
        if name not in (*_OVERRIDES, *_WITHOUT_EFFECT, *_QUANTIZING):
            raise UsageError(
                f"from_pretrained has no option {name!r}",
                expected="torch_dtype, dtype, device, device_map, attn_implementation, vram, ram, "
                "max_context, " + ", ".join(_OVERRIDES),
            )
    return {name: value for name, value in options.items() if name in _OVERRIDES}


def _placed(device: torch.device | str | None, device_map: object) -> torch.device | str | None:
    """The device that `device` or `device_map` names; None: the default device."""
    if device_map is None:
        return device
    if device is not None:
        raise UsageError("give either device or device_map", where="device_map")
    place = device_map
    if isinstance(place, Mapping):
        place = next(iter(place.values())) if len(set(place.values())) == 1 else repr(place)
    if place == "auto":
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
        raise UsageError(
            "wrong type",
            where="load_options",
            expected="LoadOptions",
            found=type(load_options).__name__,
        )


def _agreed(
    torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """The dtype that either of the two spellings names."""
    first, second = parse_dtype(torch_dtype), parse_dtype(dtype)
    if first is not None and second is not None and first != second:
        raise UsageError(
            "torch_dtype and dtype differ", where="dtype", expected=first, found=second
        )
    return first or second
