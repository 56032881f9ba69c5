"""What the public models share: loading, saving, moving, a cache of their own.

Knows no forward pass and no bits; weights come through qmix.models.load.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from qmix.experts.store import Store
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve
from qmix.kernels import attention
from qmix.kernels.choice import choose
from qmix.models import arguments, load, offload, quantization, save
from qmix.models.offload import Tiers
from qmix.models.options import LoadOptions
from qmix.nn.cache import KVCache
from qmix.nn.cache_slab import CacheSlab
from qmix.nn.decoder import Decoder
from qmix.nn.outputs import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)


_ADAPT = "qmix.hf.adapt(model) gives a model of transformers over the same weights."
_BY_LOADING = "Load the model again with the option that you need."
# What transformers' models have and these do not, with what to do instead.
_NOT_HERE = {
    "push_to_hub": "Save the model, and run: hf upload ORG/NAME DIRECTORY",
    "dequantize": "Load the checkpoint that it was quantized from.",
    "prune_heads": "There is nothing like it here.",
    **dict.fromkeys(
        ("add_adapter", "load_adapter", "set_adapter"),
        "qmix quantize --adapter DIR merges a LoRA into the weights.",
    ),
    **dict.fromkeys(
        (
            "gradient_checkpointing_enable",
            "gradient_checkpointing_disable",
            "loss_function",
            "enable_input_require_grads",
            "prepare_inputs_for_generation",
            "base_model_prefix",
        ),
        _ADAPT,
    ),
    **dict.fromkeys(("to_bettertransformer", "set_input_embeddings"), _BY_LOADING),
}


class NotHereError(UnsupportedError, AttributeError):
    """A model has no such attribute, and transformers' models do."""


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
        backend: str | None = None,
        kv: str | None = None,
        load_options: LoadOptions | None = None,
        progress: load.Progress | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory, dense or 4-bit.

        Args:
            directory: a folder, a GGUF file, or ORG/NAME of the hub, downloaded if need be.
            torch_dtype, dtype: of the activations and dense weights; default: the checkpoint's.
            device: default: the GPU if there is one. device_map: "auto", a device or {"": device}.
            attn_implementation: "eager", "sdpa" (default), "flash_attention_2" or "triton".
            vram, ram: memory to use at most on the GPU and on the host: "16GiB", "16GB" or bytes.
                Experts that do not fit stay in host memory or in the file until the router chooses
                them; the output is the same. Such a model cannot be trained or moved.
            max_context: positions that the budgets leave room for; default: 4096, or the model's.
            backend: whose code multiplies, "qmix", "bitsandbytes" or "torch"; default: what
                QMIX_BACKEND names, or "auto", the first of these that is right on the device.
            kv: how caches keep keys and values, "16" (default: in the model's dtype) or "int8".
            load_options: dtype, device, vram, ram, max_context, backend and kv as one object.
            progress: called with the bytes that are there, and all that will be.
            options: fields of the config that no shape depends on, such as `sliding_window` or
                `num_labels`. `config`: one with other such values. The hub's: `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`. Accelerate's `max_memory`.
                `load_in_4bit=True`, or `quantization_config`: round each matrix as it is read, as
                `qmix quantize` would. Options of transformers that change nothing are accepted.

        Raises:
            CheckpointError: a file is missing, damaged, or its tensors are not the model's.
            UnsupportedError: a layout, an attention or a named backend that is not available.
            UsageError: an unknown option, or a value that is none of an option's.
            ResourceError: the model does not fit the budgets, or the memory that is free.
        """
        hub = HubOptions.taken(options)
        given: dict[str, Any] = {"dtype": dtype, "device": device, "vram": vram, "ram": ram}
        given |= {"torch_dtype": torch_dtype, "device_map": device_map, "max_context": max_context}
        given |= {"max_memory": options.pop("max_memory", None), "backend": backend, "kv": kv}
        placed = arguments.load_options(load_options, given)
        asked, config = quantization.taken(options), options.pop("config", None)
        changes = arguments.config_changes(options, attn_implementation)
        folder = resolve(directory, need="weights", options=hub)
        checkpoint = open_checkpoint(folder)
        if config is not None:
            changes = {**arguments.of_config(config, checkpoint.config), **changes}
        model = cls._rounded(checkpoint, placed, asked, changes, progress)
        model.read_generation_config(folder)
        return model

    @classmethod
    def _rounded(
        cls,
        checkpoint: Checkpoint,
        options: LoadOptions,
        asked: quantization.Asked,
        changes: dict[str, Any],
        progress: load.Progress | None,
    ) -> Self:
        """The model of a checkpoint, quantized on the way if that is asked for."""
        rounded = quantization.of_checkpoint(checkpoint, asked)
        if rounded is None:
            return cls.from_checkpoint(checkpoint, options, progress=progress, **changes)
        dtype = rounded.model_dtype(options.dtype)
        changes = {**changes, "quantization_config": rounded.settings(dtype)}
        options = replace(options, dtype=dtype)
        return cls.from_checkpoint(rounded, options, progress=progress, **changes)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        options: LoadOptions,
        *,
        tiers: Tiers | None = None,
        progress: load.Progress | None = None,
        **changes: Any,
    ) -> Self:
        """Build a model without storage and fill it, one tensor at a time.

        Args:
            tiers: where experts are kept; default: as planned for the budgets. Parameters are
                frozen unless all experts are on the device.
            progress: as in `from_pretrained`.
            changes: fields of the config.

        Raises:
            CheckpointError: a tensor is damaged, or the checkpoint is of a model without this head.
            UnsupportedError: the named backend cannot run.
            ResourceError: the model does not fit the budgets, or the memory that is free.
        """
        dtype = options.dtype or checkpoint.dtype
        backend = choose(options.backend, options.device, dtype, offload.schemes(checkpoint, dtype))
        if tiers is None:
            tiers = offload.plan_tiers(checkpoint, options)
        with torch.device("meta"):
            model = cls(checkpoint.config.replace(**changes))
        model._decoder.backend, model._decoder.kv = backend, options.kv
        modules = model.checkpoint_modules()
        load.fill_model(modules, checkpoint, dtype, options.device, tiers, backend, progress)
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

    def documents(self) -> dict[str, dict[str, Any]]:
        """JSON files that belong to the model beside config.json, by name."""
        return {}

    def save_pretrained(
        self, directory: str | Path, *, max_shard_bytes: int = SHARD_BYTES, **options: Any
    ) -> None:
        """Write config.json and sharded safetensors; dense and 4-bit weights stay as they are.

        Args:
            options: transformers' `max_shard_size` ("5GB" or bytes) and `safe_serialization=True`.

        Raises:
            UsageError: the directory already holds weights or a config; another option.
            UnsupportedError: `push_to_hub`.
            WriteError: a file cannot be written; the directory is as it was.
        """
        max_shard_bytes = arguments.shard_bytes(options, max_shard_bytes)
        config = self.config.replace(architectures=[type(self).__name__])
        save.save(self, config, directory, max_shard_bytes, self.documents())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _NOT_HERE:
                raise
            raise NotHereError(f"qmix's models have no {name}", remedy=_NOT_HERE[name]) from None

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
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except (AssertionError, RuntimeError) as error:
            if torch.cuda.is_available() or "cuda" not in str(error).lower():
                raise
            raise ResourceError(
                "no CUDA device is available",
                where=".to()",
                remedy="Leave the model where it is, or check the driver.",
            ) from None
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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, **_: Any) -> nn.Embedding:
        """The embedding, which keeps its size.

        Raises:
            UnsupportedError: another size.
        """
        embedding = self.get_input_embeddings()
        if new_num_tokens not in (None, embedding.num_embeddings):
            raise UnsupportedError(
                "the vocabulary cannot grow or shrink",
                where="resize_token_embeddings",
                expected=embedding.num_embeddings,
                found=repr(new_num_tokens)[:80],
                remedy="Resize it with transformers and save it, before qmix quantize.",
            )
        return embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-model head, if there is one."""
        return self._modules.get("lm_head")

    def can_generate(self) -> bool:
        """Whether there is a head that generates."""
        return "lm_head" in self._modules

    @property
    def is_quantized(self) -> bool:
        """Whether a weight is packed."""
        return any(getattr(module, "_packed", None) is not None for module in self.modules())

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Where the modules are, in accelerate's words; offloaded experts where they are kept."""
        place = {"": str(self.device)}
        if self.store is not None:
            place["experts"] = "disk" if self.device.type == "cpu" else "cpu"
        return place

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights; a packed one counts as what it stands for."""
        left_out = self.get_input_embeddings() if exclude_embeddings else None
        total, seen = 0, set()
        for module in self.modules():
            if module is left_out:
                continue
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen and (parameter.requires_grad or not only_trainable):
                    seen.add(id(parameter))
                    total += parameter.numel()
            packed = getattr(module, "_packed", None)
            if packed is not None and id(packed) not in seen and not only_trainable:
                seen.add(id(packed))
                total += math.prod(packed.shape)
        return total

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights that are in memory, packed ones as they are stored."""
        seen: dict[int, int] = {}
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                seen[id(parameter)] = parameter.nbytes
            packed = getattr(module, "_packed", None)
            if packed is not None:
                seen[id(packed)] = packed.nbytes
        return sum(seen.values())

    def new_cache(self, batch: int = 1, capacity: int = 0) -> KVCache:
        """An empty cache for this model, with storage for `capacity` positions.

        Raises UnsupportedError as Decoder.decode, after a fork.
        """
        self.check_process()
        return KVCache(self.config, batch, capacity=capacity, **self._cache_form)

    def new_rows(self, rows: int, positions: int) -> Sequence[KVCache]:
        """Empty caches of one row each, whose next positions can be computed together.

        On a GPU they have storage for `positions` from the start, and one for all. Raises as
        `new_cache`.
        """
        if self.device.type != "cuda":
            return [self.new_cache() for _ in range(rows)]
        self.check_process()
        return CacheSlab(self.config, rows, positions, **self._cache_form).rows

    @property
    def _cache_form(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device, "kv": self._decoder.kv}
