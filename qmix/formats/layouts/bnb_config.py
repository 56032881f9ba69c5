"""bitsandbytes' settings as transformers writes them, checked against the tensors.

Each tensor says itself how it is quantized; the settings repeat that. Knows nothing of files.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qmix.formats.layouts.settings import PackedModule, Settings, check_dense
from qmix.weights.scheme import NF4_BLOCK_SIZES

_BLOCK_SIZES = ("bnb_4bit_blocksize", "bnb_4bit_block_size", "blocksize", "block_size")
_DTYPES = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
_DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64", "int8", "uint8")
_DENSE = ("llm_int8_skip_modules", "modules_to_not_convert")


def read(document: Mapping[str, Any] | None, where: str) -> Settings:
    """The settings.

    Args:
        document: config.json's `quantization_config`; None if there is none.
        where: the file, for errors.

    Raises:
        CheckpointError: settings of another method.
    """
    settings = Settings(document or {}, where)
    settings.check_method("bitsandbytes", "bitsandbytes'")
    return settings


def confirm(
    settings: Settings, modules: Collection[PackedModule], _: Collection[Sequence[str]] = ()
) -> None:
    """Check the settings against the packed modules.

    Raises:
        CheckpointError: a field of a wrong type, or one that the tensors contradict.
    """
    one = next((module.name for module in modules), "a weight")
    for field, expected in (("load_in_4bit", True), ("load_in_8bit", False)):
        for spelling in (field, f"_{field}"):
            if settings.flag(spelling) not in (None, expected):
                raise settings.contradiction(spelling, str(expected).lower(), one)
    for field in _DTYPES:
        # They say in which dtype to compute and under which to store the bytes: any one is right.
        dtype = settings.get(field, "uint8")
        if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in _DTYPE_NAMES:
            raise settings.wrong(field, f"one of {', '.join(_DTYPE_NAMES)}")
    kind = settings.get("bnb_4bit_quant_type")
    double_quant = settings.flag("bnb_4bit_use_double_quant")
    for module in modules:
        if kind not in (None, module.scheme.kind):
            raise settings.contradiction(
                "bnb_4bit_quant_type", repr(module.scheme.kind), module.name
            )
        if double_quant not in (None, module.scheme.double_quant):
            expected_flag = str(module.scheme.double_quant).lower()
            raise settings.contradiction("bnb_4bit_use_double_quant", expected_flag, module.name)
        _check_block_size(settings, module)
    for field in _DENSE:
        check_dense(settings, field, modules)


def _check_block_size(settings: Settings, module: PackedModule) -> None:
    rows, columns = module.shape
    for field in _BLOCK_SIZES:
        size = settings.get(field)
        if size is None:
            continue
        if type(size) is not int or size not in NF4_BLOCK_SIZES:
            raise settings.wrong(field, f"one of {', '.join(map(str, NF4_BLOCK_SIZES))}")
        if -(-rows * columns // size) != module.groups:
            raise settings.contradiction(field, module.scheme.block_size, module.name)
