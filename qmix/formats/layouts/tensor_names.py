"""Which tensors make up a packed weight: the four layouts by the names, shapes and settings of files.

Knows no torch and reads no data: what the bits mean is said in bnb, compressed, awq and gptq. Shape
letters: N outputs, K inputs.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from qmix.errors import CheckpointError, UnsupportedError

Layout = Literal["bitsandbytes", "compressed-tensors", "AWQ", "GPTQ"]

WORD_BITS = 32
# Integers that are read, by their bits, and the kind of their Scheme.
KINDS: Mapping[int, Literal["int4", "int8"]] = {4: "int4", 8: "int8"}

AWQ_FILE = "quant_config.json"  # where AutoAWQ keeps the settings, beside config.json

WEIGHT = ".weight"
ABSMAX = ".weight.absmax"
QUANT_MAP = ".weight.quant_map"
NESTED_ABSMAX = ".weight.nested_absmax"
NESTED_QUANT_MAP = ".weight.nested_quant_map"
STATE_NF4 = ".weight.quant_state.bitsandbytes__nf4"
STATE_FP4 = ".weight.quant_state.bitsandbytes__fp4"

# What stands beside `P.weight` where P is packed, in bitsandbytes' order.
BNB_SUFFIXES = (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE_NF4, STATE_FP4)

QWEIGHT = ".qweight"
QZEROS = ".qzeros"
SCALES = ".scales"
G_IDX = ".g_idx"
BIAS = ".bias"

PACKED = ".weight_packed"
SCALE = ".weight_scale"
SHAPE = ".weight_shape"
ZERO_POINT = ".weight_zero_point"
PACKED_G_IDX = ".weight_g_idx"

_REQUIRED = (PACKED, SCALE, SHAPE)
_OPTIONAL = (ZERO_POINT, PACKED_G_IDX)


def bnb_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the packed weight of module `prefix`; none if it is not packed."""
    states = tuple(prefix + suffix for suffix in BNB_SUFFIXES if prefix + suffix in names)
    if not states:
        return ()
    weight = prefix + WEIGHT
    return (weight, *states) if weight in names else states


def compressed_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the weight of module `prefix`; none if it is another layout's.

    Those that must be there are among them even if they are not.
    """
    if not any(prefix + suffix in names for suffix in (*_REQUIRED, *_OPTIONAL)):
        return ()
    optional = [suffix for suffix in _OPTIONAL if prefix + suffix in names]
    return tuple(prefix + suffix for suffix in (*_REQUIRED, *optional))


def awq_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the weight of module `prefix`; none if it is not AWQ's.

    Those that must be there are among them even if they are not. GPTQ's have the same names and
    `.g_idx`.
    """
    if prefix + QWEIGHT not in names or prefix + G_IDX in names:
        return ()
    return tuple(prefix + suffix for suffix in (QWEIGHT, QZEROS, SCALES))


def gptq_names(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the weight of module `prefix`; none if it is not GPTQ's.

    Those that must be there are among them even if they are not. AWQ's have the same names but for
    `.g_idx`; the shape of `.qweight` tells them apart.
    """
    if prefix + QWEIGHT not in names and prefix + G_IDX not in names:
        return ()
    bias = (BIAS,) if prefix + BIAS in names else ()
    return tuple(prefix + suffix for suffix in (QWEIGHT, QZEROS, SCALES, G_IDX, *bias))


def gptq_bits(qweight_rows: int, columns: int) -> int | None:
    """Bits a code, from the rows of `.qweight` and the weight's inputs; None if it fits none."""
    fitting = (bits for bits in (4, 8, 2, 3) if qweight_rows * WORD_BITS == columns * bits)
    return next(fitting, None)


def compressed_bits(words: int, columns: int) -> int | None:
    """Bits a code, from a row's words and the weight's inputs; None if it fits none."""
    fitting = (bits for bits in (4, 8, 2, 3, 5, 6, 7) if words == -(-columns * bits // WORD_BITS))
    return next(fitting, None)


def check_awq(document: Mapping[str, Any] | None, where: str) -> None:
    """Refuse settings of another layout: `quantization_config` of config.json or AWQ_FILE.

    Args:
        document: None if there is neither.
        where: the file, for errors.

    Raises:
        UnsupportedError: another version than gemm, or other bits.
        CheckpointError: the settings are not AWQ's.
    """
    if document is None:
        return
    fields = unlisted(document)
    if fields.get("quant_method", "awq") != "awq":
        raise CheckpointError(
            "the tensors are AWQ's and quant_method says otherwise",
            where=where,
            expected="'awq'",
            found=repr(fields["quant_method"]),
        )
    version, bits = fields.get("version", "gemm"), fields.get("bits", fields.get("w_bit", 4))
    remedy = "Quantize the original checkpoint with qmix quantize."
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnsupportedError(
            f"AWQ in the {version} version is not read",
            where=where,
            expected="gemm",
            found=repr(version),
            remedy=remedy,
        )
    if type(bits) is not int or bits != 4:
        raise UnsupportedError(
            "AWQ is read in 4 bits only", where=where, expected=4, found=repr(bits), remedy=remedy
        )


def check_compressed(document: Mapping[str, Any] | None, where: str) -> None:
    """Refuse settings of another layout: config.json's `quantization_config`.

    Args:
        document: None if there is none.
        where: the file, for errors.

    Raises:
        UnsupportedError: another format. CheckpointError: the settings are not compressed-tensors'.
    """
    if document is None:
        return
    if document.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            "the tensors are compressed-tensors' and quant_method says otherwise",
            where=where,
            expected="'compressed-tensors'",
            found=repr(document.get("quant_method")),
        )
    layout = document.get("format", "pack-quantized")
    if layout != "pack-quantized":
        raise UnsupportedError(
            f"compressed-tensors in the {layout} format is not read",
            where=where,
            expected="pack-quantized",
            found=repr(layout),
            remedy="Quantize the original checkpoint with qmix quantize.",
        )


def unlisted(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with one-element lists replaced by their element, as some files have them."""
    return {
        key: value[0] if isinstance(value, list) and len(value) == 1 else value
        for key, value in document.items()
    }
