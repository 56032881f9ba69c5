"""MLX's settings, checked against the tensors; and written.

config.json's `quantization` holds bits, group size and mode of all modules, and beside them, by a
module's name, an object of the same fields for a module of its own, or false for one that is dense
(mlx-lm 0.32, utils.py). Knows no torch and reads no data.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.files.safetensors_header import TensorInfo
from qmix.formats.layouts.settings import PackedModule, Settings
from qmix.weights.scheme import Kind, Scheme

FIELD = "quantization"
MODES = ("affine", "mxfp4", "nvfp4")
_UNREAD_MODES = ("mxfp8",)
# Bits of MLX's codes -> the kind of weight that holds them.
KINDS: Mapping[int, Kind] = {2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8"}
IN_PLANES = (5, 6)  # bits of the codes that a weight does not hold as a stream
_FP4_BLOCKS = {"mxfp4": 32, "nvfp4": 16}
_EXPERT = re.compile(r"(.*)\.experts\.\d+\.(w[123])")
_STACKS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class MLXConfig:
    """The settings: those of all modules, and those of single modules by name.

    Attributes:
        default: bits, group_size and mode; None if there are no settings.
        rules: None where a module is said to be dense.
    """

    default: Settings | None
    rules: Mapping[str, Settings | None]

    def of(self, names: Sequence[str]) -> tuple[Settings | None, bool]:
        """The settings of a module, and whether they say that it is quantized.

        Args:
            names: its spellings.
        """
        for name in (*names, *(mlx_name(name) for name in names)):
            if name in self.rules:
                rule = self.rules[name]
                return rule or self.default, rule is not None
        return self.default, True


def bits_of(words: TensorInfo | None, matrix: tuple[int, int], module: str) -> int:
    """Bits of a code, from the header of the codes and (N, K).

    Raises:
        CheckpointError: the codes' shape fits no number of bits.
        UnsupportedError: one bit.
    """
    rows, columns = matrix
    if words is None:
        return 4  # it is missing, which is said elsewhere
    shape = words.shape
    bits = shape[-1] * 32 / columns if len(shape) == 2 and shape[0] == rows else 0
    if bits == 1:
        raise UnsupportedError(
            f"module {module}: MLX's affine codes of 1 bit are not read",
            where=str(words.file),
            expected=f"{', '.join(map(str, KINDS))} bits",
            found="1 bit",
            remedy="Quantize the original checkpoint with qmix quantize.",
        )
    if bits not in KINDS:
        raise CheckpointError(
            f"tensor {module}.weight: wrong shape",
            where=str(words.file),
            expected=f"[{rows}, {columns} inputs x bits / 32], bits one of "
            + ", ".join(map(str, KINDS)),
            found=list(shape),
        )
    return int(bits)


def rearranged(words: TensorInfo, matrix: tuple[int, int]) -> bool:
    """Whether codes of 5 or 6 bits come into planes."""
    return words.nbytes * 8 in [bits * matrix[0] * matrix[1] for bits in IN_PLANES]


def mlx_name(module: str) -> str:
    """A module's name in MLX's own model, where experts are stacked."""
    match = _EXPERT.fullmatch(module)
    return f"{match[1]}.switch_mlp.{_STACKS[match[2]]}" if match else module


def read(document: Mapping[str, Any] | None, where: str) -> MLXConfig:
    """The settings.

    Args:
        document: config.json's `quantization`, or `quantization_config`; None if it has neither.
        where: the file, for errors.

    Raises:
        CheckpointError: a field of a wrong type or value; settings of another method.
        UnsupportedError: a mode that is not read.
    """
    if document is None:
        return MLXConfig(None, {})
    default = Settings(document, where)
    default.check_method("mlx", "MLX's")
    _check(default)
    rules: dict[str, Settings | None] = {}
    for name, value in document.items():
        if value is False:
            rules[name] = None
        elif isinstance(value, Mapping):
            inner = default.inner(name)
            assert inner is not None
            _check(inner)
            rules[name] = inner
    return MLXConfig(default, rules)


def _check(settings: Settings) -> None:
    """Check the fields of one object by themselves."""
    for field, values in (("bits", (1, *KINDS)), ("group_size", (16, 32, 64, 128))):
        value = settings.get(field)
        if value is not None and (type(value) is not int or value not in values):
            raise settings.wrong(field, f"one of {', '.join(map(str, values))}")
    mode = settings.get("mode", "affine")
    if mode in _UNREAD_MODES:
        raise settings.unread("mode", "MLX's 8-bit floats are not read", " or ".join(MODES))
    if mode not in MODES:
        raise settings.wrong("mode", f"one of {', '.join(MODES)}")


def confirm(
    settings: MLXConfig,
    modules: Collection[PackedModule],
    dense: Collection[Sequence[str]],
) -> None:
    """Check the settings against the modules.

    Raises:
        CheckpointError: a field that the tensors contradict.
    """
    for module in modules:
        own, quantized = settings.of(module.names)
        if own is None:
            continue
        if not quantized:
            name = next(n for n in (*module.names, *map(mlx_name, module.names)) if n in own.fields)
            raise own.contradiction(name, "an object", module.name)
        _confirm(own, module)
    for names in dense:
        for name in (*names, *map(mlx_name, names)):
            if settings.rules.get(name) is not None and settings.default is not None:
                raise settings.default.contradiction(name, "false", names[0])


def _confirm(settings: Settings, module: PackedModule) -> None:
    scheme, size = module.scheme, module.shape[1] // module.groups
    mode = settings.get("mode", "affine")
    if scheme.kind == "e2m1":
        modes = [name for name, block in _FP4_BLOCKS.items() if block == size]
    else:
        modes = ["affine"]
    if mode not in modes:
        raise settings.contradiction("mode", " or ".join(modes) or "no mode", module.name, mode)
    if settings.get("group_size", size) != size:
        raise settings.contradiction("group_size", size, module.name)
    bits = settings.get("bits", 4 if scheme.kind == "e2m1" else None)
    kind: Kind | None = "e2m1" if scheme.kind == "e2m1" and bits == 4 else KINDS.get(bits)
    if bits is not None and kind != scheme.kind:
        raise settings.contradiction("bits", scheme.bits, module.name)


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """The settings of packed weights, for both fields of config.json, as mlx-lm 0.32 writes them.

    The most frequent scheme stands for all; other modules have an entry by MLX's name.

    Args:
        schemes: of every packed module by its classic name, the embedding among them.
    """
    ((base, _),) = Counter(schemes.values()).most_common(1)
    rules = {mlx_name(module): _fields(s) for module, s in schemes.items() if s != base}
    return {**_fields(base), **rules}


def _fields(scheme: Scheme) -> dict[str, object]:
    if scheme.kind == "e2m1":
        (mode,) = (name for name, block in _FP4_BLOCKS.items() if block == scheme.block_size)
        return {"group_size": scheme.block_size, "bits": 4, "mode": mode}
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
