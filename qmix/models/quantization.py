"""Quantizing while loading: BitsAndBytesConfig, and a checkpoint whose weights come in 4 bits.

A weight is rounded as `qmix quantize` rounds it, one matrix in memory at a time. Knows no modules.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmix.errors import UnsupportedError, UsageError, wrong_value
from qmix.formats import Checkpoint, names
from qmix.formats.layouts import writer
from qmix.formats.names import ModelTensor
from qmix.models.options import parse_dtype
from qmix.planning.stored_model import StoredModel
from qmix.weights import nf4
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import DENSE, Recipe, Scheme


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """How from_pretrained quantizes; the names are transformers', whose own object is taken too.

    What is not given is as `qmix quantize` does it: NF4 with double quantization.

    Attributes:
        load_in_4bit: False quantizes nothing.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: store the scales in 8 bits.
        bnb_4bit_compute_dtype: the dtype of activations and dense weights, if from_pretrained is
            given none.
        llm_int8_skip_modules: names of modules, or of modules around them, that stay dense. Router,
            embedding and head always do.
        load_in_8bit: must be False.
        bnb_4bit_quant_storage, llm_int8_threshold, llm_int8_enable_fp32_cpu_offload,
        llm_int8_has_fp16_weight: have no effect here.

    Raises:
        UsageError: a value that is none of a field's.
        UnsupportedError: 8 bits.
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    llm_int8_skip_modules: list[str] | None = None
    load_in_8bit: bool = False
    bnb_4bit_quant_storage: object = None
    llm_int8_threshold: object = None
    llm_int8_enable_fp32_cpu_offload: object = None
    llm_int8_has_fp16_weight: object = None

    def __post_init__(self) -> None:
        for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise wrong_value(name, "True or False", getattr(self, name))
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise wrong_value("bnb_4bit_quant_type", "'nf4' or 'fp4'", self.bnb_4bit_quant_type)
        skipped = self.llm_int8_skip_modules
        if skipped is not None and not (
            isinstance(skipped, (list, tuple)) and all(isinstance(name, str) for name in skipped)
        ):
            raise wrong_value("llm_int8_skip_modules", "a list of modules' names", skipped)
        if self.load_in_8bit:
            raise UnsupportedError(
                "qmix does not quantize to 8 bits while loading",
                where="load_in_8bit",
                remedy="Give load_in_4bit=True, or run qmix quantize.",
            )
        parse_dtype(self.bnb_4bit_compute_dtype)

    @property
    def scheme(self) -> Scheme:
        """The scheme of every quantized weight."""
        kind: nf4.Kind = "fp4" if self.bnb_4bit_quant_type == "fp4" else "nf4"
        return Scheme(kind=kind, double_quant=self.bnb_4bit_use_double_quant)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of activations, if this says it."""
        return parse_dtype(self.bnb_4bit_compute_dtype)

    def recipe(self, checkpoint: Checkpoint) -> Recipe:
        """Which of the checkpoint's tensors gets the scheme."""
        skipped = [tensor.name for tensor in checkpoint.tensors if self._skips(tensor.prefix)]
        recipe = Recipe.uniform(self.scheme, attention=True)
        if not skipped:
            return recipe
        return Recipe((("|".join(map(re.escape, skipped)), DENSE), *recipe.rules))

    def to_dict(self) -> dict[str, Any]:
        """The fields, in transformers' words."""
        values = asdict(self) | {"quant_method": self.quant_method}
        compute = self.compute_dtype
        values["bnb_4bit_compute_dtype"] = str(compute).removeprefix("torch.") if compute else None
        return values

    def _skips(self, module: str) -> bool:
        """Whether one of the skipped names is a run of parts of the module's name."""
        return any(
            f".{name}." in f".{spelling}."
            for name in self.llm_int8_skip_modules or ()
            for spelling in names.spellings(module)
        )


FIELDS = frozenset(field.name for field in fields(BitsAndBytesConfig))


# What is asked for: nothing, a method that qmix has only as a command, or how to quantize.
Asked = BitsAndBytesConfig | str | None


def taken(options: dict[str, Any]) -> Asked:
    """What from_pretrained's options ask for, which are taken out of them.

    Raises:
        UsageError: an unknown field, or a value that is none of a field's.
        UnsupportedError: 8 bits.
    """
    given = {name: options.pop(name) for name in FIELDS & options.keys()}
    config = options.pop("quantization_config", None)
    if config is None:
        config = BitsAndBytesConfig(**given)
    elif any(given.values()):
        raise UsageError(
            "give either quantization_config or its fields",
            where="quantization_config",
            found=", ".join(sorted(name for name, value in given.items() if value)),
        )
    if not isinstance(config, BitsAndBytesConfig):
        config = _read(config)
    return config if isinstance(config, str) or config.load_in_4bit else None


def _read(config: object) -> BitsAndBytesConfig | str:
    """A dictionary, or an object of transformers, which always says its compute dtype."""
    document: object = config
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        document = config.to_dict()
        if isinstance(document, Mapping) and document.get("bnb_4bit_compute_dtype") == "float32":
            document = {**document, "bnb_4bit_compute_dtype": None}
    if not isinstance(document, Mapping):
        raise wrong_value("quantization_config", "a BitsAndBytesConfig or a dictionary", config)
    method = document.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        return method
    values = {n: v for n, v in document.items() if not n.startswith("_") and n != "quant_method"}
    for name in values.keys() - FIELDS:
        raise UsageError(
            f"quantization_config has no field {str(name)[:80]!r}",
            expected=", ".join(sorted(FIELDS)),
        )
    return BitsAndBytesConfig(**values)


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """A dense checkpoint, each weight of which is rounded when it is read.

    Attributes:
        recipe: which tensor gets which scheme.
        compute_dtype: of the model, if nobody asks for another.
    """

    recipe: Recipe
    compute_dtype: torch.dtype | None = None

    def built(self, tensor: ModelTensor, tensors: Mapping[str, Tensor]) -> Weight:
        """The weight of one linear layer, as a quantized checkpoint would give it."""
        weight, scheme = super().built(tensor, tensors), self.recipe.scheme_of(tensor.name)
        if scheme.kind == "dense":
            return weight
        where = f"{self.file_of(tensor)}: {tensor.name}"
        dense = weight.data if isinstance(weight, Dense) else weight.dequantize(torch.float32)
        rounded = nf4.quantize(dense, scheme, where=where)
        return replace(rounded, out_dtype=self.rounded_dtype(tensor))

    def built_anywhere(self, tensor: ModelTensor) -> bool:
        """Whether it stays dense: the host rounds."""
        dense = self.recipe.scheme_of(tensor.name).kind == "dense"
        return dense and super().built_anywhere(tensor)

    def stored_model(self, dtype: torch.dtype) -> StoredModel:
        """What a plan has to know of the model."""
        name = str(dtype).removeprefix("torch.")
        return StoredModel.rounded(self.metadata, self.recipe, name)

    def model_dtype(self, given: torch.dtype | None) -> torch.dtype:
        """The dtype of activations and dense weights; `given` comes first."""
        return given or self.compute_dtype or self.rounded_dtype(self.tensors[0])

    def settings(self, dtype: torch.dtype) -> dict[str, object] | None:
        """config.json's `quantization_config` of the quantized model."""
        linear = [tensor for tensor in self.tensors if tensor.linear]
        schemes = {tensor.prefix: self.recipe.scheme_of(tensor.name) for tensor in linear}
        return writer.quantization_config(schemes, dtype)


def of_checkpoint(checkpoint: Checkpoint, asked: Asked) -> QuantizedCheckpoint | None:
    """The checkpoint as it is to be quantized; None if it is to be loaded as it is.

    Raises:
        UnsupportedError: by a method that qmix has only as a command.
    """
    if asked is None:
        return None
    packed = next((tensor for tensor in checkpoint.tensors if checkpoint.packed(tensor)), None)
    if packed is not None:
        packing = checkpoint.packing(packed)
        assert packing is not None
        warnings.warn(
            f"{checkpoint.metadata.directory.name} is quantized already ({packing.layout}) and is "
            "loaded as it is",
            stacklevel=4,
        )
        return None
    if isinstance(asked, str):
        raise UnsupportedError(
            f"qmix does not quantize by {asked[:80]!r} while loading",
            where="quantization_config",
            expected="a BitsAndBytesConfig",
            remedy="Run qmix quantize (--method gptq, rtn or auto) once, and load what it writes.",
        )
    metadata, shards = checkpoint.metadata, checkpoint.shards
    return QuantizedCheckpoint(metadata, shards, asked.recipe(checkpoint), asked.compute_dtype)
