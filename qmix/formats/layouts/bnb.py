"""bitsandbytes' NF4 and FP4 layout: the tensors and the JSON state of one weight, read and written.

The layout is that of bitsandbytes 0.50.2 (functional.py, `QuantState.as_dict` and `from_dict`); the
hub's 4-bit checkpoints have had it since 2023. Knows nothing of files or of rounding.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from qmix import strict_json
from qmix.formats.layouts.checked_tensors import CheckedTensors
from qmix.formats.layouts.tensor_names import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_QUANT_MAP,
    QUANT_MAP,
    STATE_FP4,
    STATE_NF4,
    WEIGHT,
)
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.dense import all_finite
from qmix.weights.scales import NestedScales, Scales
from qmix.weights.scheme import NESTED_BLOCK, NF4_BLOCK_SIZES, Kind, Scheme
from qmix.weights.table import FP4_VALUES, NF4_VALUES, Table

_STATE_SUFFIXES: Mapping[Kind, str] = {"nf4": STATE_NF4, "fp4": STATE_FP4}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# `bnb_4bit_quant_storage`: the same bytes under another dtype, so that FSDP can flatten them.
_STORAGE_DTYPES = (torch.uint8, *_DTYPES.values())
_STATE_BYTES = 4096
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
# The longest spelling of a float32 as Python's shortest double. It bounds the state's length before
# the mean of the scales is known.
_LONGEST_OFFSET = -1.1754943508222875e-38


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return; the state's length is an upper bound.

    Args:
        prefix: the module's name.
        shape: (N, K).
        dtype: of the weight before quantization.
    """
    count = prod(shape)
    blocks = -(-count // scheme.block_size)
    specs = [
        TensorSpec(prefix + WEIGHT, torch.uint8, (-(-count // 2), 1)),
        TensorSpec(
            prefix + ABSMAX, torch.uint8 if scheme.double_quant else torch.float32, (blocks,)
        ),
        TensorSpec(prefix + QUANT_MAP, torch.float32, (len(NF4_VALUES),)),
    ]
    if scheme.double_quant:
        nested_blocks = -(-blocks // NESTED_BLOCK)
        specs.append(TensorSpec(prefix + NESTED_ABSMAX, torch.float32, (nested_blocks,)))
        specs.append(TensorSpec(prefix + NESTED_QUANT_MAP, torch.float32, (256,)))
    offset = _LONGEST_OFFSET if scheme.double_quant else None
    state = _state_bytes(scheme.kind, scheme.block_size, dtype, shape, offset)
    specs.append(TensorSpec(prefix + _STATE_SUFFIXES[scheme.kind], torch.uint8, (len(state),)))
    return tuple(specs)


def pack(weight: Table, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight, named and ordered as bitsandbytes' `Linear4bit` saves them.

    `P.weight` is uint8 [N * K / 2, 1]; the state is UTF-8 JSON as uint8 [length].
    """
    nested = weight.scales if isinstance(weight.scales, NestedScales) else None
    tensors = {prefix + WEIGHT: weight.codes.view(-1, 1)}
    if nested is None:
        assert isinstance(weight.scales, Tensor)
        tensors[prefix + ABSMAX] = weight.scales
        tensors[prefix + QUANT_MAP] = weight.table
    else:
        tensors[prefix + ABSMAX] = nested.codes
        tensors[prefix + QUANT_MAP] = weight.table
        tensors[prefix + NESTED_ABSMAX] = nested.outer
        tensors[prefix + NESTED_QUANT_MAP] = nested.map
    offset = nested.offset if nested else None
    kind = weight.scheme.kind
    state = _state_bytes(kind, weight.block_size, weight.dtype, weight.shape, offset)
    tensors[prefix + _STATE_SUFFIXES[kind]] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return tensors


def _state_bytes(
    kind: Kind, block_size: int, dtype: torch.dtype, shape: tuple[int, int], offset: float | None
) -> bytes:
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = offset
    return json.dumps(state).encode()


def unpack(tensors: Mapping[str, Tensor], prefix: str, where: str) -> Table:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
    """
    stored = CheckedTensors(tensors, prefix, where)
    kind: Literal["nf4", "fp4"] = "fp4" if stored.has(STATE_FP4) else "nf4"
    if kind == "fp4" and stored.has(STATE_NF4):
        raise stored.wrong(STATE_NF4, "a second state", STATE_FP4, STATE_NF4)
    state = _read_state(stored, kind)
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    codes = _codes(stored, shape)
    blocks = -(-prod(shape) // block_size)
    values = FP4_VALUES if kind == "fp4" else NF4_VALUES
    table = _finite(stored, QUANT_MAP, len(values))
    if not torch.equal(table.cpu(), torch.tensor(values, dtype=torch.float32)):
        raise stored.wrong(QUANT_MAP, f"not the {kind.upper()} table", found=table.tolist())
    scales: Scales
    if "nested_offset" in state:
        scales = NestedScales(
            codes=stored.tensor(ABSMAX, torch.uint8, (blocks,)),
            outer=_scales(stored, NESTED_ABSMAX, -(-blocks // NESTED_BLOCK)),
            map=_finite(stored, NESTED_QUANT_MAP, 256),
            offset=state["nested_offset"],
        )
    else:
        scales = _scales(stored, ABSMAX, blocks)
    return Table(
        codes=codes,
        scales=scales,
        table=table,
        out_shape=shape,
        out_dtype=state["dtype"],
        block_size=block_size,
        kind=kind,
    )


def _read_state(stored: CheckedTensors, kind: Kind) -> dict[str, Any]:
    """The checked state; its dtype is a torch dtype, its offset rounded to float32."""
    suffix = _STATE_SUFFIXES[kind]
    data = stored.tensor(suffix, torch.uint8)
    if data.dim() != 1 or data.numel() > _STATE_BYTES:
        raise stored.wrong(suffix, "too long", f"at most {_STATE_BYTES} B", f"{data.numel()} B")
    where = f"{stored.where}: {stored.prefix}{suffix}"
    state = strict_json.loads(bytes(data.tolist()), where=where)
    nested = (
        stored.has(NESTED_ABSMAX) or stored.has(NESTED_QUANT_MAP) or _NESTED_KEYS & state.keys()
    )
    keys = _KEYS | (_NESTED_KEYS if nested else set())
    if state.keys() != keys:
        raise stored.wrong(suffix, "wrong keys", sorted(keys), sorted(state))

    def require(key: str, right: bool, expected: str) -> None:
        if not right:
            raise stored.wrong(suffix, f"wrong {key}", expected, repr(state[key]))

    require("quant_type", state["quant_type"] == kind, kind)
    block_size, shape = state["blocksize"], state["shape"]
    sizes = ", ".join(map(str, NF4_BLOCK_SIZES))
    known = type(block_size) is int and block_size in NF4_BLOCK_SIZES
    require("blocksize", known, f"one of {sizes}")
    is_shape = isinstance(shape, list) and len(shape) == 2
    require("shape", is_shape and all(type(n) is int and 0 < n < 1 << 31 for n in shape), "[N, K]")
    dtype = _dtype(state["dtype"])
    require("dtype", dtype is not None, " or ".join(_DTYPES))
    state["dtype"] = dtype
    if nested:
        size, offset = state["nested_blocksize"], state["nested_offset"]
        right = type(size) is int and size == NESTED_BLOCK
        require("nested_blocksize", right, str(NESTED_BLOCK))
        require("nested_dtype", _dtype(state["nested_dtype"]) == torch.float32, "float32")
        # A double beyond float32 would become an infinite scale.
        right = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        require("nested_offset", right, "a finite float32")
        state["nested_offset"] = torch.tensor(offset, dtype=torch.float32).item()
    return state


def _codes(stored: CheckedTensors, shape: tuple[int, ...]) -> Tensor:
    """uint8 [N * K / 2], whatever dtype the bytes are stored under."""
    codes = stored.tensor(WEIGHT)
    if codes.dtype not in _STORAGE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORAGE_DTYPES)
        raise stored.wrong(WEIGHT, "wrong storage dtype", f"one of {names}", codes.dtype)
    nbytes = -(-prod(shape) // 2)
    if codes.shape != (codes.numel(), 1) or codes.nbytes != nbytes:
        raise stored.wrong(
            WEIGHT,
            f"not the codes of a weight {list(shape)}",
            f"{nbytes} B in one column",
            f"{codes.nbytes} B as {list(codes.shape)}",
        )
    return codes.contiguous().view(-1).view(torch.uint8)


def _scales(stored: CheckedTensors, suffix: str, count: int) -> Tensor:
    scales = _finite(stored, suffix, count)
    if bool((scales < 0).any()):
        raise stored.wrong(suffix, "a negative scale", found=scales.min().item())
    return scales


def _finite(stored: CheckedTensors, suffix: str, count: int) -> Tensor:
    """float32 [count], all finite."""
    values = stored.tensor(suffix, torch.float32, (count,))
    if not all_finite(values):
        raise stored.wrong(suffix, "holds NaN or infinity")
    return values


def _dtype(name: object) -> torch.dtype | None:
    """One of three dtypes by name, with or without `torch.`; never any attribute of torch."""
    return _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None


def quantization_config(
    scheme: Scheme, dtype: torch.dtype, dense: Sequence[str] = ("lm_head", "gate")
) -> dict[str, object]:
    """config.json's `quantization_config`, as transformers has written it since 4.39.

    Args:
        dtype: in which matmuls compute.
        dense: the modules that are not packed, by name or by the last part of their names.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.kind,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dense),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
