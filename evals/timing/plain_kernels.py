"""The GPU kernels that read no packed weights, in all variants: attention, norms, rotary, router.

All have the 8x7B's shapes. Those that quantize by GPTQ are among them. evals.aot compiles them;
nothing is compiled here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from qmix.evals.timing.machine_code import KernelSource
from qmix.kernels.gpu import (
    attention,
    attention_triton,
    fused_triton,
    grid,
    moe,
    moe_triton,
    pointwise,
    pointwise_triton,
)
from qmix.kernels.gpu.launch import power_of_2
from qmix.quantize.rounding import gptq_kernels, gptq_triton
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.gptq_choice import KERNEL_SIZES

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN, _EXPERTS, _EXPERTS_PER_TOKEN = 32, 8, 128, 4096, 8, 2
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {
    "padding_mask": "*u8",
    "arrivals": "*i32",
    "past": "*i32",
    "starts": "*i32",
    "sums": "*fp32",
    "peaks": "*fp32",
    "totals": "*fp32",
    "partials": "*fp32",
    "ids": "*i64",
    "weights": "*fp32",
    "weighted": "*fp16",
    "squares": "*fp32",
    "scale": "*fp32",
}
_ROUNDING_POINTERS = {
    **dict.fromkeys(("weights", "carried", "upper", "clips", "factors", "errors"), "*fp32"),
    **dict.fromkeys(("scale", "low", "high", "kept", "moved", "gradient", "hessian"), "*fp32"),
    "codes": "*i16",
}
_FLOATS = ("eps", "other_sign")
_APART = ("out", "arrivals")  # the splits are merged by a launch of its own
_STEPS, _NEW = ("key_steps", "value_steps"), ("new_keys", "new_values")
_CODES = dict.fromkeys(("keys", "values"), "*i8") | dict.fromkeys(_STEPS, "*fp32")
_MODEL_POINTERS = (
    "q",
    "normed",
    "keys",
    "values",
    "new_keys",
    "new_values",
    "out",
    "x",
    "weight",
    "total",
    "gate",
    "logits",
    "cos",
    "sin",
)


Codes = Literal["", "codes", "new codes"]


@dataclass(frozen=True)
class PlainKernel:
    """A kernel that reads no weights, with its constants and the tensors that are not passed.

    Attributes:
        codes: keys and values are rows of codes; of one new column, "new", they are stored first.
        half: the result is float16, as a packed product takes it; else it is of `dtype`.
    """

    kernel: str
    dtype: torch.dtype
    constants: tuple[tuple[str, int], ...]
    absent: tuple[str, ...]
    warps: int
    stages: int
    arch: int
    codes: Codes = ""
    half: bool = False

    def __str__(self) -> str:
        shape = " ".join(f"{name} {value}" for name, value in self.constants)
        without = f", no {' '.join(self.absent)}" if self.absent else ""
        codes = f" {self.codes}" if self.codes else ""
        types = _TYPES[self.dtype] + " to fp16" * self.half
        return f"sm_{self.arch} {self.kernel} {types}{codes} {shape}{without}"

    def source(self) -> KernelSource:
        """The kernel in the form that is compiled."""
        modules = (attention_triton, pointwise_triton, fused_triton, moe_triton, gptq_triton)
        function: Any = next(filter(None, (getattr(m, self.kernel, None) for m in modules)))
        constants: dict[str, object] = {**dict(self.constants), **dict.fromkeys(self.absent)}
        pointers = dict.fromkeys(_MODEL_POINTERS, f"*{_TYPES[self.dtype]}") | _POINTERS
        pointers |= _ROUNDING_POINTERS
        if self.half:
            pointers |= dict.fromkeys(("out", "normed"), "*fp16")
        if self.codes:
            pointers |= _CODES
        absent = () if self.codes.startswith("new") else _NEW if self.codes else (*_NEW, *_STEPS)
        constants |= {name: None for name in absent if name in function.arg_names}
        names = [name for name in function.arg_names if name not in constants]
        types = {name: "fp32" if name in _FLOATS else pointers.get(name, "i32") for name in names}
        multiples = ("_batch", "_head", "_row", "_stride")
        sizes = {name for name in names if name.endswith(multiples)} | {"D"}
        if self.kernel == "combine":
            sizes |= {"N"}
        if self.codes:  # of d + 4 bytes
            sizes -= {"k_row", "v_row"}
        tile = dict(self.constants)
        # Rows of codes are read in 32 bits: their size is no multiple of more.
        elements = 0 if self.codes else 2 * tile.get("COLUMNS", 0) * tile.get("D", 0)
        return KernelSource(
            function, constants, types, {*pointers, *sizes}, self.warps, self.stages, self.arch,
            weights=0, copies=elements * self.dtype.itemsize // (16 * 32 * self.warps),
        )  # fmt: skip


def plain_kernels(
    archs: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> Iterator[PlainKernel]:
    """All kernels that `qmix.kernels.gpu.attention` and `.pointwise` can launch, and `combine`.

    And those of `qmix.quantize.rounding.gptq_kernels`, which are of float32 whatever the dtypes.

    Where a constant counts the rounds of an unrolled loop, it has the most that occur.
    """
    for arch in archs:
        yield from _rounding(arch)
    for arch, dtype in product(archs, dtypes):
        yield from _attention(dtype, arch)
        for kernel, warps, constants, absent, half in _pointwise():
            shape = tuple(constants.items())
            yield PlainKernel(kernel, dtype, shape, absent, warps, 1, arch, half=half)


def _attention(dtype: torch.dtype, arch: int) -> Iterator[PlainKernel]:
    """Over a cache in a decode step, and over all columns; in 16 bits and in codes."""
    merging = {"PARTS": attention.LARGEST_SPLIT}
    kinds: tuple[tuple[Codes, Codes], ...] = (("", ""), ("codes", "new codes"))
    for old, new in kinds:
        codes = bool(old)
        shape = attention.blocks_for(1, dtype, codes=codes)
        plain = PlainKernel("split", dtype, (), (), shape.warps, shape.stages, arch)
        split = {"ROWS": shape.rows, **_tile(shape), "PARTS": 1, "DEPENDENT": 0}
        for early, starts in product(range(1 + (arch >= 90)), (("starts",), ())):
            apart = split | {"DEPENDENT": early}
            absent = ("padding_mask", *starts)
            for parts, without in ((apart, (*absent, *_APART)), (apart | merging, absent)):
                constants = tuple(parts.items())
                half = without == absent
                yield replace(plain, constants=constants, absent=without, codes=new, half=half)
        for mask in (("padding_mask",), ()):
            absent = (*mask, "past", "starts")
            constants = tuple(split.items())
            yield replace(plain, constants=constants, absent=(*absent, *_APART), codes=old)
            for queries in (attention.SMALLEST_TILE, attention.SMALLEST_TILE + 1):
                shape = attention.blocks_for(queries, dtype, codes=codes)
                prefill = {"QUERIES": shape.rows, **_tile(shape)}
                constants = tuple(prefill.items())
                yield replace(
                    plain, kernel="prefill", constants=constants, absent=absent, warps=shape.warps,
                    stages=shape.stages, codes=old,
                )  # fmt: skip


def _rounding(arch: int) -> Iterator[PlainKernel]:
    """Groups of every size, in 4 bits as `qmix quantize` rounds them."""
    trials = RoundingOptions().trials
    for size, symmetric in product(KERNEL_SIZES, (True, False)):
        shape = {"SIZE": size, "BITS": 4, "SYMMETRIC": int(symmetric)}
        columns = {"COLUMNS": gptq_kernels.COLUMNS}
        search = shape | {"LIVE": 1, "SIGNS": 1 + symmetric} | columns
        rounding = shape | {"TRIALS": trials, "R": power_of_2(trials)} | columns
        for kernel, constants, unused in (
            ("search_grid", search, ("low", "high")),
            ("round_group", rounding, ("low",)),
            ("refine_group", shape | columns, ("low",)),
        ):
            absent = unused if symmetric else ()
            fixed = tuple(constants.items())
            yield PlainKernel(kernel, torch.float32, fixed, absent, 1, 1, arch)


def _tile(shape: attention.BlockShape) -> dict[str, int]:
    group_heads = _HEADS // _KV_HEADS
    tile = {"COLUMNS": shape.columns, "STAGES": shape.stages}
    return {**tile, "GROUP_HEADS": group_heads, "D": _HEAD_DIM}


def _pointwise() -> Iterator[tuple[str, int, Mapping[str, int], tuple[str, ...], bool]]:
    """Name, warps, constants, the tensors that are not passed, whether the result is float16."""
    for power, half in product(range(attention.LARGEST_SPLIT.bit_length()), (False, True)):
        yield "merge", 4, {"PARTS": 1 << power, "D": _HEAD_DIM}, (), half
    warps = pointwise.norm_warps(_HIDDEN)
    routed = {"EXPERTS": _EXPERTS, "E": _EXPERTS, "CHOSEN": _EXPERTS_PER_TOKEN}
    unrouted = dict.fromkeys(routed, 1)
    block, of_experts = {"BLOCK": _HIDDEN}, {"CHOICES": _EXPERTS_PER_TOKEN}
    no_router = ("gate", "logits", "ids", "weights")
    single = {"SPLITS": 1, "CHOICES": 1}
    yield "residual_norm", warps, block | unrouted | single, ("partials", *no_router), False
    yield "residual_norm", warps, block | unrouted | single, no_router, True
    yield "start_norm", warps, block, (), False
    rotations = tuple({"D": _HEAD_DIM, "ROWS": rows} for rows in (1, 16))
    for splits in (1, 2, 4, 8, 16):
        split = {**single, "SPLITS": splits}
        for half in (False, True):
            yield "residual_norm", warps, block | unrouted | split | of_experts, no_router, half
        yield "residual_norm", warps, block | routed | split, (), True
        for rotation in rotations:
            heads = {"SPLITS": splits, "H": _HEADS, "G": _KV_HEADS}
            count = pointwise.rotation_warps(rotation["ROWS"])
            for absent in ((), ("starts",)):
                yield "rotate_store", count, heads | rotation, absent, False
    for rotation in rotations:
        yield "rotate", pointwise.rotation_warps(rotation["ROWS"]), rotation, (), False
    yield "route", 1, routed, (), False
    for choices in (1, _EXPERTS_PER_TOKEN):
        sums = {"SPLITS": grid.LARGEST_SPLIT, "CHOICES": choices, "BLOCK": moe.COMBINED}
        yield "combine", 4, sums, (), False
