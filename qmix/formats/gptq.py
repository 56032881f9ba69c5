"""GPTQ's layout, 4-bit: the tensors of one weight and the settings beside them, read and written.

As AutoGPTQ wrote it since 2023 ("gptq", v1) and gptqmodel 7.7 ("gptq_v2"); v1 stores each zero
less one. Shape letters: N outputs, K inputs, G groups. Knows nothing of files or of rounding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.members import (
    Members,
    nibbles,
    unlisted,
    words,
    zeros_or_symmetric,
)
from qmix.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4, reorder_codes
from qmix.scheme import Scheme

QWEIGHT = ".qweight"
QZEROS = ".qzeros"
SCALES = ".scales"
G_IDX = ".g_idx"
BIAS = ".bias"

_REQUIRED = (QWEIGHT, QZEROS, SCALES, G_IDX)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_WORD_CODES = 8
_ONES = 0x11111111


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the tensors do not say, or say a second time.

    Attributes:
        version: 1 if the file stores each zero less one, 2 if it stores the zero.
        symmetric: every zero is 8.
        group_size: inputs a group, -1 for all; None if it is not one number for all weights.
        where: the file that says so.
    """

    version: int = 1
    symmetric: bool = True
    group_size: int | None = None
    where: str = "no quantization_config"


def settings(document: Mapping[str, Any] | None, where: str) -> Settings:
    """From config.json's `quantization_config` or from `quantize_config.json`.

    A missing `checkpoint_format` means v1 and a missing `sym` true, as in AutoGPTQ.

    Args:
        document: None if there is neither.
        where: the file, for errors.

    Raises:
        UnsupportedError: another layout, or other bits. CheckpointError: a value of the wrong type.
    """
    if document is None:
        return Settings()
    fields = unlisted(document)
    method = fields.get("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(
            "the tensors are GPTQ's and quant_method says otherwise",
            where=where,
            expected="'gptq'",
            found=repr(method),
        )
    given = (fields.get("checkpoint_format"), fields.get("format"))
    named = {str(layout) for layout in given if layout is not None}
    if fields.get("is_marlin_format"):
        named.add("marlin")
    if len(named) > 1:
        raise CheckpointError(
            "checkpoint_format and format differ", where=where, found=" and ".join(sorted(named))
        )
    layout = named.pop() if named else "gptq"
    if layout not in _VERSIONS:
        raise UnsupportedError(
            f"GPTQ in the {layout} format is not read",
            where=where,
            expected=" or ".join(_VERSIONS),
            found=layout,
            remedy="Quantize the original checkpoint with qmix quantize.",
        )
    bits = fields.get("bits", 4)
    if type(bits) is not int or bits != 4:
        raise UnsupportedError(
            "GPTQ is read in 4 bits only", where=f"{where}: bits", expected=4, found=repr(bits)
        )
    symmetric = fields.get("sym", True)
    if type(symmetric) is not bool:
        raise CheckpointError(
            "wrong type", where=f"{where}: sym", expected="true or false", found=repr(symmetric)
        )
    size = fields.get("group_size")
    if size is not None and (type(size) is not int or size not in (-1, *GROUP_SIZES)):
        raise CheckpointError(
            "unknown group size",
            where=f"{where}: group_size",
            expected=f"-1 or one of {', '.join(map(str, GROUP_SIZES))}",
            found=repr(size),
        )
    return Settings(
        version=_VERSIONS[layout],
        symmetric=symmetric,
        group_size=None if fields.get("dynamic") else size,
        where=where,
    )


def members(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the weight of module `prefix`; none if it is not GPTQ's.

    Those that must be there are among them even if they are not. AWQ's have the same names but for
    `.g_idx`; the shape of `.qweight` tells them apart.
    """
    if prefix + QWEIGHT not in names and prefix + G_IDX not in names:
        return ()
    bias = (BIAS,) if prefix + BIAS in names else ()
    return tuple(prefix + suffix for suffix in (*_REQUIRED, *bias))


def unpack(
    tensors: Mapping[str, Tensor],
    prefix: str,
    where: str,
    shape: tuple[int, int],
    declared: Settings,
) -> Int4:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; others than this module's may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the format or the settings say.
        UnsupportedError: other bits than 4.
    """
    read = Members(tensors, prefix, where, shape)
    rows, columns = shape
    read.tensor(G_IDX, torch.int32, (columns,))  # before the bits, which follow from K
    qweight = read.tensor(QWEIGHT, torch.int32, None)
    expected = (columns // _WORD_CODES, rows)
    if qweight.shape != expected:
        for bits in (2, 3, 8):
            if qweight.shape == (columns * bits // 32, rows):
                raise read.unsupported(QWEIGHT, "GPTQ is read in 4 bits only", 4, f"{bits} bits")
    if columns % _WORD_CODES or rows % _WORD_CODES:
        raise read.wrong(QWEIGHT, "no whole words", "multiples of 8", f"weight {list(shape)}")
    qweight = read.tensor(QWEIGHT, torch.int32, expected)
    scales = read.scales(SCALES, 0)
    groups = scales.shape[0]
    if declared.group_size is not None:
        size = columns if declared.group_size == -1 else declared.group_size
        if size * groups != columns:
            raise read.wrong(
                SCALES,
                f"not the group size of {declared.where}",
                f"groups of {size} inputs",
                f"{groups} groups of {columns} inputs",
            )
    zeros = _zeros(read, groups, declared)
    if read.has(BIAS):
        # AutoGPTQ wrote biases for layers that have none; they are zero.
        bias = read.tensor(BIAS, scales.dtype, (rows,))
        if bool((bias != 0).any()):
            raise read.wrong(BIAS, "a Mixtral has no biases", "zeros", bias.abs().max().item())
    perm = read.permutation(G_IDX, groups)
    codes = qweight.T.contiguous().view(torch.uint8)
    return Int4(
        codes=codes if perm is None else reorder_codes(codes, perm),
        scales=scales.T.contiguous(),
        zeros=zeros,
        perm=perm,
    )


def _zeros(read: Members, groups: int, declared: Settings) -> Tensor | None:
    """uint8 [N, G]; None if symmetric, which the settings must confirm."""
    rows = read.shape[0]
    stored = read.tensor(QZEROS, torch.int32, (groups, rows // _WORD_CODES)).long()
    if declared.version == 1:
        # On whole words, as gptqmodel: a zero of 0 was stored by borrowing from the next nibble.
        stored = stored + _ONES
    zeros = nibbles(stored & 0xFFFFFFFF).reshape(groups, rows).T.contiguous()
    if not declared.symmetric:
        return zeros_or_symmetric(zeros)
    wrong = zeros[zeros != SYMMETRIC_ZERO]
    if wrong.numel():
        less = 1 if declared.version == 1 else 0
        raise read.wrong(
            QZEROS,
            f"not the zeros of a symmetric weight (sym of {declared.where})",
            f"{SYMMETRIC_ZERO - less} in every four bits (version {declared.version})",
            int(wrong[0]) - less,
            remedy="Correct checkpoint_format (gptq or gptq_v2) or sym there.",
        )
    return None


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that `pack` will give.

    Args:
        shape: (N, K), multiples of 8; K one of the group size.
        dtype: of the scales.
    """
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    return {
        prefix + QWEIGHT: (torch.int32, (columns // _WORD_CODES, rows)),
        prefix + QZEROS: (torch.int32, (groups, rows // _WORD_CODES)),
        prefix + SCALES: (dtype, (groups, rows)),
        prefix + G_IDX: (torch.int32, (columns,)),
    }


def pack(weight: Int4, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight in v1, named and ordered as AutoGPTQ saves them.

    Raises:
        UnsupportedError: a zero of 0, which v1's readers disagree about.
    """
    rows, columns = weight.shape
    groups = weight.scales.shape[1]
    codes, index = weight.codes, torch.arange(columns, dtype=torch.int32) // weight.group_inputs
    if weight.perm is not None:
        inverse = torch.argsort(weight.perm)
        codes, index = reorder_codes(codes, inverse), index[inverse]
    if weight.zeros is None:
        zeros = torch.full((groups, rows), SYMMETRIC_ZERO, dtype=torch.uint8)
    else:
        zeros = weight.zeros.T
        if bool((zeros == 0).any()):
            raise UnsupportedError(
                f"module {prefix}: GPTQ v1 cannot store a zero of 0",
                expected="zeros of 1 to 15",
                found=0,
                remedy="Quantize symmetrically, or with zeros clamped to 1..15.",
            )
    return {
        prefix + QWEIGHT: codes.view(torch.int32).T.contiguous(),
        prefix + QZEROS: words((zeros - 1).view(groups, -1, _WORD_CODES)),
        prefix + SCALES: weight.scales.T.contiguous(),
        prefix + G_IDX: index,
    }


def config(scheme: Scheme, *, attention: bool) -> dict[str, object]:
    """config.json's `quantization_config` and `quantize_config.json` of what `pack` writes.

    The fields that vLLM 0.33 and SGLang demand, and no more.

    Args:
        attention: whether the attention's matrices are packed too.
    """
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {} if attention else {r"-:.*\.self_attn\..*": {}},
        "group_size": scheme.group_size,
        "lm_head": False,
        "quant_method": "gptq",
        "sym": scheme.symmetric,
    }
