"""Which tensors make up a packed weight: the layouts by their names, dtypes and shapes.

Knows no torch and reads no data. What the bits mean is written in bnb, compressed_tensors, awq and
gptq.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

Layout = Literal[
    "GGUF", "bitsandbytes", "ModelOpt", "FP8", "compressed-tensors", "AWQ", "GPTQ", "HQQ", "MLX"
]

WORD_BITS = 32
# Bits of the integers that are read -> the kind of their Scheme.
INTEGER_KINDS: Mapping[int, Literal["int2", "int3", "int4", "int8"]] = {
    2: "int2",
    3: "int3",
    4: "int4",
    8: "int8",
}

WEIGHT = ".weight"
ABSMAX = ".weight.absmax"
QUANT_MAP = ".weight.quant_map"
NESTED_ABSMAX = ".weight.nested_absmax"
NESTED_QUANT_MAP = ".weight.nested_quant_map"
STATE_NF4 = ".weight.quant_state.bitsandbytes__nf4"
STATE_FP4 = ".weight.quant_state.bitsandbytes__fp4"

# The tensors beside `P.weight` if P is packed, in bitsandbytes' order.
_BNB_SUFFIXES = (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE_NF4, STATE_FP4)

QWEIGHT = ".qweight"
QZEROS = ".qzeros"
SCALES = ".scales"
G_IDX = ".g_idx"
BIAS = ".bias"

# MLX; its codes are WEIGHT and its scales SCALES.
BIASES = ".biases"
EXPERT_SCALE = ".global_scale"

PACKED = ".weight_packed"
SCALE = ".weight_scale"
SHAPE = ".weight_shape"
ZERO_POINT = ".weight_zero_point"
PACKED_G_IDX = ".weight_g_idx"

# NVFP4, MXFP4 and FP8; scales of activations are optional everywhere.
GLOBAL_SCALE = ".weight_global_scale"
INPUT_GLOBAL_SCALE = ".input_global_scale"
SCALE_2 = ".weight_scale_2"
INPUT_SCALE = ".input_scale"
INPUT_SCALE_UB = ".input_scale_ub"
SCALE_INV = ".weight_scale_inv"
ACTIVATION_SCALES = (INPUT_GLOBAL_SCALE, INPUT_SCALE, INPUT_SCALE_UB)

_COMPRESSED_REQUIRED = (PACKED, SCALE, SHAPE)
_COMPRESSED_OPTIONAL = (ZERO_POINT, PACKED_G_IDX)


def bnb_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it is not packed."""
    states = tuple(prefix + suffix for suffix in _BNB_SUFFIXES if prefix + suffix in names)
    if not states:
        return ()
    weight = prefix + WEIGHT
    return (weight, *states) if weight in names else states


def compressed_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it has another layout.

    Required names are among them even if the files lack them.
    """
    if not any(
        prefix + suffix in names for suffix in (*_COMPRESSED_REQUIRED, *_COMPRESSED_OPTIONAL)
    ):
        return ()
    optional = [suffix for suffix in _COMPRESSED_OPTIONAL if prefix + suffix in names]
    return tuple(prefix + suffix for suffix in (*_COMPRESSED_REQUIRED, *optional))


def compressed_fp4_names(prefix: str, names: Collection[str], *, nested: bool) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight in NVFP4 (`nested`) or MXFP4."""
    required = (PACKED, SCALE, GLOBAL_SCALE) if nested else (PACKED, SCALE)
    return _with_activations(prefix, required, names)


def modelopt_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight in ModelOpt's NVFP4."""
    return _with_activations(prefix, (WEIGHT, SCALE, SCALE_2), names)


def fp8_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight in FP8; either scale is required."""
    scale = SCALE_INV if prefix + SCALE_INV in names else SCALE
    return _with_activations(prefix, (WEIGHT, scale), names)


def _with_activations(
    prefix: str, required: Sequence[str], names: Collection[str]
) -> tuple[str, ...]:
    """The required names, and those of the scales of activations that the files have."""
    optional = [suffix for suffix in ACTIVATION_SCALES if prefix + suffix in names]
    return tuple(prefix + suffix for suffix in (*required, *optional))


def awq_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it is not AWQ's.

    Required names are among them even if the files lack them. GPTQ has the same names and `.g_idx`.
    """
    if prefix + QWEIGHT not in names or prefix + G_IDX in names:
        return ()
    return tuple(prefix + suffix for suffix in (QWEIGHT, QZEROS, SCALES))


def gptq_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it is not GPTQ's.

    Required names are among them even if the files lack them. AWQ has the same names except
    `.g_idx`; the shape of `.qweight` tells the two apart.
    """
    if prefix + QWEIGHT not in names and prefix + G_IDX not in names:
        return ()
    bias = (BIAS,) if prefix + BIAS in names else ()
    return tuple(prefix + suffix for suffix in (QWEIGHT, QZEROS, SCALES, G_IDX, *bias))


def mlx_names(prefix: str, names: Collection[str], *, affine: bool) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it is not MLX's.

    Required names are among them even if the files lack them. GPTQ and AWQ have scales of the same
    name beside tensors of others.
    """
    own = prefix + WEIGHT in names and prefix + SCALES in names
    if not own and prefix + BIASES not in names and prefix + EXPERT_SCALE not in names:
        return ()
    if prefix + QWEIGHT in names or prefix + QZEROS in names or prefix + G_IDX in names:
        return ()
    required = (WEIGHT, SCALES, BIASES) if affine else (WEIGHT, SCALES)
    optional = [s for s in (BIASES, EXPERT_SCALE) if prefix + s in names and s not in required]
    return tuple(prefix + suffix for suffix in (*required, *optional))


def gptq_bits(qweight_rows: int, columns: int) -> int | None:
    """Bits of a code, from the rows of `.qweight` and K; None if no number of bits fits."""
    fitting = (bits for bits in (4, 8, 2, 3) if qweight_rows * WORD_BITS == columns * bits)
    return next(fitting, None)


def compressed_bits(words: int, columns: int) -> int | None:
    """Bits of a code, from the words of a row and K; None if no number of bits fits."""
    fitting = (bits for bits in (4, 8, 2, 3, 5, 6, 7) if words == -(-columns * bits // WORD_BITS))
    return next(fitting, None)


def without_lists(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document, with a list of one element replaced by the element, as some files have them."""
    return {
        key: value[0] if isinstance(value, list) and len(value) == 1 else value
        for key, value in document.items()
    }
