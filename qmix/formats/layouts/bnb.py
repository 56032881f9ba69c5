"""bitsandbytes' NF4 and FP4 layout: the tensors and JSON blob of one weight, strictly read, and written.

The layout of bitsandbytes 0.50.2 (functional.py, `QuantState.as_dict` and `from_dict`); the hub's
4-bit checkpoints of 2023 and later have the same. Knows nothing of files or of rounding.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.formats.layouts.tensor_names import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_QUANT_MAP,
    QUANT_MAP,
    STATE_FP4,
    STATE_NF4,
    WEIGHT,
)
from qmix.weights.nf4 import FP4, FP4_VALUES, NF4, NF4_VALUES, NestedAbsmax
from qmix.weights.scheme import NESTED_BLOCK, NF4_BLOCK_SIZES, Kind, Scheme

_STATES: Mapping[Kind, str] = {"nf4": STATE_NF4, "fp4": STATE_FP4}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# `bnb_4bit_quant_storage`: the same bytes under another name, so that FSDP can flatten them.
_STORAGE = (torch.uint8, *_DTYPES.values())
_STATE_BYTES = 4096
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
# The longest spelling of a float32 as Python's shortest double: bounds the blob before the mean of
# the scales is known.
_LONGEST_OFFSET = -1.1754943508222875e-38


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that `pack` will give; the blob's length is an upper bound.

    Args:
        prefix: the module's name.
        shape: (N, K).
        dtype: of the weight before quantization.
    """
    count = prod(shape)
    blocks = -(-count // scheme.block_size)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        prefix + WEIGHT: (torch.uint8, (-(-count // 2), 1)),
        prefix + ABSMAX: (torch.uint8 if scheme.double_quant else torch.float32, (blocks,)),
        prefix + QUANT_MAP: (torch.float32, (len(NF4_VALUES),)),
    }
    if scheme.double_quant:
        specs[prefix + NESTED_ABSMAX] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        specs[prefix + NESTED_QUANT_MAP] = (torch.float32, (256,))
    offset = _LONGEST_OFFSET if scheme.double_quant else None
    blob = _state(scheme.kind, scheme.block_size, dtype, shape, offset)
    specs[prefix + _STATES[scheme.kind]] = (torch.uint8, (len(blob),))
    return specs


def pack(weight: NF4, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight, named and ordered as bitsandbytes' `Linear4bit` saves them.

    `P.weight` is uint8 [N * K / 2, 1]; the blob is UTF-8 JSON as uint8 [length].
    """
    nested = weight.absmax if isinstance(weight.absmax, NestedAbsmax) else None
    tensors = {prefix + WEIGHT: weight.codes.view(-1, 1)}
    if nested is None:
        assert isinstance(weight.absmax, Tensor)
        tensors[prefix + ABSMAX] = weight.absmax
        tensors[prefix + QUANT_MAP] = weight.table
    else:
        tensors[prefix + ABSMAX] = nested.codes
        tensors[prefix + QUANT_MAP] = weight.table
        tensors[prefix + NESTED_ABSMAX] = nested.absmax
        tensors[prefix + NESTED_QUANT_MAP] = nested.map
    offset = nested.offset if nested else None
    kind = weight.scheme.kind
    blob = _state(kind, weight.block_size, weight.dtype, weight.shape, offset)
    tensors[prefix + _STATES[kind]] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return tensors


def _state(
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


def unpack(tensors: Mapping[str, Tensor], prefix: str, where: str) -> NF4:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; others than this module's may be among them.
        where: the file, for errors.

    Raises:
        CheckpointError: a tensor is missing, or is not what the format says.
    """
    return _Reader(tensors, prefix, where).read()


class _Reader:
    """The strict reader of one weight: every method checks one tensor, and names it if it is wrong."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
        self.tensors = tensors
        self.prefix = prefix
        self.where = where
        self.kind: Kind = "fp4" if prefix + STATE_FP4 in tensors else "nf4"
        self.blob = _STATES[self.kind]

    def read(self) -> NF4:
        name = self.kind.upper()
        if self.kind == "fp4" and self.prefix + STATE_NF4 in self.tensors:
            raise self.wrong(STATE_NF4, "a second state", STATE_FP4, STATE_NF4)
        state = self.state()
        shape, block = tuple(state["shape"]), state["blocksize"]
        codes = self.codes(shape)
        blocks = -(-prod(shape) // block)
        values = FP4_VALUES if self.kind == "fp4" else NF4_VALUES
        table = self.floats(QUANT_MAP, len(values))
        if not torch.equal(table.cpu(), torch.tensor(values, dtype=torch.float32)):
            raise self.wrong(QUANT_MAP, f"not the {name} table", found=table.tolist())
        absmax: Tensor | NestedAbsmax
        if "nested_offset" in state:
            absmax = NestedAbsmax(
                codes=self.tensor(ABSMAX, torch.uint8, blocks),
                absmax=self.scales(NESTED_ABSMAX, -(-blocks // NESTED_BLOCK)),
                map=self.floats(NESTED_QUANT_MAP, 256),
                offset=state["nested_offset"],
            )
        else:
            absmax = self.scales(ABSMAX, blocks)
        packed = FP4 if self.kind == "fp4" else NF4
        return packed(
            codes=codes,
            absmax=absmax,
            table=table,
            out_shape=shape,
            out_dtype=state["dtype"],
            block_size=block,
        )

    def wrong(
        self, suffix: str, what: str, expected: object = None, found: object = None
    ) -> CheckpointError:
        return CheckpointError(
            f"tensor {self.prefix}{suffix}: {what}",
            where=self.where,
            expected=expected,
            found=None if found is None else str(found)[:200],
        )

    def state(self) -> dict[str, Any]:
        """The checked blob; its dtype as a torch dtype, its offset rounded to float32."""
        blob = self.tensor(self.blob, torch.uint8, None)
        if blob.dim() != 1 or blob.numel() > _STATE_BYTES:
            raise self.wrong(
                self.blob, "too long", f"at most {_STATE_BYTES} B", f"{blob.numel()} B"
            )
        name = f"{self.where}: {self.prefix}{self.blob}"
        state = strict_json.loads(bytes(blob.tolist()), where=name)
        nested = {s for s in (NESTED_ABSMAX, NESTED_QUANT_MAP) if self.prefix + s in self.tensors}
        keys = _KEYS | (_NESTED_KEYS if nested or _NESTED_KEYS & state.keys() else set())
        if state.keys() != keys:
            raise self.wrong(self.blob, "wrong keys", sorted(keys), sorted(state))

        def require(key: str, right: bool, expected: str) -> None:
            if not right:
                raise self.wrong(self.blob, f"wrong {key}", expected, repr(state[key]))

        require("quant_type", state["quant_type"] == self.kind, self.kind)
        block, shape = state["blocksize"], state["shape"]
        sizes = ", ".join(map(str, NF4_BLOCK_SIZES))
        require("blocksize", type(block) is int and block in NF4_BLOCK_SIZES, f"one of {sizes}")
        require(
            "shape",
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(n) is int and 0 < n < 1 << 31 for n in shape),
            "[N, K]",
        )
        dtype = _dtype(state["dtype"])
        require("dtype", dtype is not None, " or ".join(_DTYPES))
        state["dtype"] = dtype
        if "nested_offset" in state:
            size, offset = state["nested_blocksize"], state["nested_offset"]
            right = type(size) is int and size == NESTED_BLOCK
            require("nested_blocksize", right, str(NESTED_BLOCK))
            require("nested_dtype", _dtype(state["nested_dtype"]) == torch.float32, "float32")
            # A double beyond float32 would become an infinite scale.
            right = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
            require("nested_offset", right, "a finite float32")
            state["nested_offset"] = torch.tensor(offset, dtype=torch.float32).item()
        return state

    def codes(self, shape: tuple[int, ...]) -> Tensor:
        """uint8 [N * K / 2], whatever dtype the bytes are stored under."""
        stored = self.tensor(WEIGHT, None, None)
        if stored.dtype not in _STORAGE:
            names = ", ".join(str(d).removeprefix("torch.") for d in _STORAGE)
            raise self.wrong(WEIGHT, "wrong storage dtype", f"one of {names}", stored.dtype)
        expected = -(-prod(shape) // 2)
        if stored.shape != (stored.numel(), 1) or stored.nbytes != expected:
            raise self.wrong(
                WEIGHT,
                f"not the codes of a weight {list(shape)}",
                f"{expected} B in one column",
                f"{stored.nbytes} B as {list(stored.shape)}",
            )
        return stored.contiguous().view(-1).view(torch.uint8)

    def scales(self, suffix: str, count: int) -> Tensor:
        scales = self.floats(suffix, count)
        if bool((scales < 0).any()):
            raise self.wrong(suffix, "a negative scale", found=scales.min().item())
        return scales

    def floats(self, suffix: str, count: int) -> Tensor:
        floats = self.tensor(suffix, torch.float32, count)
        if not bool(torch.isfinite(floats).all()):
            raise self.wrong(suffix, "holds NaN or infinity")
        return floats

    def tensor(self, suffix: str, dtype: torch.dtype | None, count: int | None) -> Tensor:
        """A tensor of this weight; one-dimensional of `count` elements if that is given."""
        tensor = self.tensors.get(self.prefix + suffix)
        if tensor is None:
            raise self.wrong(suffix, "missing")
        if dtype is not None and tensor.dtype != dtype:
            raise self.wrong(suffix, "wrong dtype", dtype, tensor.dtype)
        if count is not None and tensor.shape != (count,):
            raise self.wrong(suffix, "wrong shape", [count], list(tensor.shape))
        return tensor


def _dtype(name: object) -> torch.dtype | None:
    """One of three dtypes by name, with or without `torch.`; never an attribute of torch by name."""
    return _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None


def config(scheme: Scheme, dtype: torch.dtype, *, attention: bool) -> dict[str, object]:
    """config.json's `quantization_config`, as transformers writes it since 4.39.

    Args:
        dtype: in which products are computed.
        attention: whether the attention's matrices are packed too.
    """
    dense = ["lm_head", "gate"]
    if not attention:
        dense += ["q_proj", "k_proj", "v_proj", "o_proj"]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.kind,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
