"""The settings of FP8 checkpoints, checked against the tensors.

They are those of the `fp8` and `fbgemm_fp8` methods of transformers and vLLM, of compressed-tensors
or of ModelOpt. Knows nothing of files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.formats.layouts import compressed_config, modelopt_config
from qmix.formats.layouts.fp8_blocks import fits_blocks
from qmix.formats.layouts.settings import PackedModule, Settings, check_dense

_METHODS = ("fp8", "fbgemm_fp8")
_DENSE = ("modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True)
class FP8Config:
    """The settings of the `fp8` or `fbgemm_fp8` method, or none.

    Attributes:
        block: outputs and inputs of a block; None if the settings name none.
    """

    settings: Settings
    block: tuple[int, int] | None = None

    def confirm(self, modules: Collection[PackedModule], _: Collection[Sequence[str]] = ()) -> None:
        """Check the settings against the FP8 modules.

        Raises:
            CheckpointError: a field that the tensors contradict.
        """
        for field in _DENSE:
            check_dense(self.settings, field, modules)
        for module in modules:
            if self.block is not None and not fits_blocks(self.block, module):
                raise self.settings.contradiction(
                    "weight_block_size", f"scales {list(module.scale_shape)}", module.name
                )


Config = FP8Config | compressed_config.CompressedConfig | modelopt_config.ModelOptConfig


def read(document: Mapping[str, Any] | None, where: str) -> Config:
    """The settings, whoever wrote them.

    Args:
        document: config.json's `quantization_config`, or ModelOpt's file; None if there is none.
        where: the file, for errors.

    Raises:
        CheckpointError: settings of a method that does not write FP8; a field of a wrong type.
        UnsupportedError: what the method's own reader refuses.
    """
    settings = Settings(document if document is not None else {}, where)
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return compressed_config.read(document, where)
    if method == "modelopt" or "quantization" in settings.fields:
        return modelopt_config.read(document, where)
    if method not in _METHODS:
        settings.check_method("fp8", "FP8")
    if settings.get("activation_scheme", "dynamic") not in ("dynamic", "static"):
        raise settings.wrong("activation_scheme", "'dynamic' or 'static'")
    if settings.get("expert_dtype", "fp8") != "fp8":
        raise settings.wrong("expert_dtype", "'fp8', as the tensors are")
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise settings.wrong("weight_block_size", "null, or two numbers above 0")
    return FP8Config(settings, None if block is None else (block[0], block[1]))


def confirm(
    config: Config, modules: Collection[PackedModule], dense: Collection[Sequence[str]]
) -> None:
    """Check the settings against the FP8 modules and the dense ones; see the classes."""
    config.confirm(modules, dense)
