"""The GPU kernels that read no weights, in all variants: attention, norms, rotary, router.

All have the 8x7B's shapes. evals.aot compiles them; nothing is compiled here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from qmix.evals.timing.machine_code import KernelSource
from qmix.kernels.gpu import attention, attention_triton, fused_triton, pointwise, pointwise_triton

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
    "normed": "*fp16",
    "weighted": "*fp16",
    "squares": "*fp32",
    "scale": "*fp32",
}
_STEPS, _NEW = ("key_steps", "value_steps"), ("new_keys", "new_values")
_CODES = dict.fromkeys(("keys", "values"), "*i8") | dict.fromkeys(_STEPS, "*fp32")
_MODEL_POINTERS = (
    "q",
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


@dataclass(frozen=True)
class PlainKernel:
    """A kernel that reads no weights, with its constants and the tensors that are not passed.

    Attributes:
        codes: keys and values are rows of codes; of one new column, "new", they are stored first.
    """

    kernel: str
    dtype: torch.dtype
    constants: tuple[tuple[str, int], ...]
    absent: tuple[str, ...]
    warps: int
    stages: int
    arch: int
    codes: Literal["", "codes", "new codes"] = ""

    def __str__(self) -> str:
        shape = " ".join(f"{name} {value}" for name, value in self.constants)
        without = f", no {' '.join(self.absent)}" if self.absent else ""
        codes = f" {self.codes}" if self.codes else ""
        return f"sm_{self.arch} {self.kernel} {_TYPES[self.dtype]}{codes} {shape}{without}"

    def source(self) -> KernelSource:
        """The kernel in the form that is compiled."""
        modules = (attention_triton, pointwise_triton, fused_triton)
        function: Any = next(filter(None, (getattr(m, self.kernel, None) for m in modules)))
        constants: dict[str, object] = {**dict(self.constants), **dict.fromkeys(self.absent)}
        pointers = dict.fromkeys(_MODEL_POINTERS, f"*{_TYPES[self.dtype]}") | _POINTERS
        if self.codes:
            pointers |= _CODES
        absent = () if self.codes.startswith("new") else _NEW if self.codes else (*_NEW, *_STEPS)
        constants |= {name: None for name in absent if name in function.arg_names}
        names = [name for name in function.arg_names if name not in constants]
        types = {name: "fp32" if name == "eps" else pointers.get(name, "i32") for name in names}
        sizes = ("D", *(name for name in names if name.endswith(("_batch", "_head", "_row"))))
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
    """All kernels that `qmix.kernels.gpu.attention` and `.pointwise` can launch."""
    for arch, dtype in product(archs, dtypes):
        for kernel, warps, stages, constants, absent in _kernels(dtype):
            one = PlainKernel(kernel, dtype, tuple(constants.items()), absent, warps, stages, arch)
            yield one
            if kernel not in ("split", "prefill"):
                continue
            shape = attention.blocks_for(constants.get("QUERIES", 1), dtype, codes=True)
            coded = replace(
                one, constants=tuple({**constants, "COLUMNS": shape.columns}.items()), codes="codes"
            )
            yield coded
            if kernel == "split" and "past" not in absent:
                yield replace(coded, codes="new codes")


def _kernels(
    dtype: torch.dtype,
) -> Iterator[tuple[str, int, int, Mapping[str, int], tuple[str, ...]]]:
    """Name, warps, stages, constants, and the tensors that are not passed."""
    tile = {"GROUP_HEADS": _HEADS // _KV_HEADS, "D": _HEAD_DIM}
    decode, prefill = attention.blocks(dtype)
    for absent in (("padding_mask",), ("past", "starts")):
        for shape, name, rows in (
            (decode, "split", "ROWS"),
            (decode, "prefill", "QUERIES"),
            (prefill, "prefill", "QUERIES"),
        ):
            size = {rows: shape.rows, "COLUMNS": shape.columns, "STAGES": shape.stages}
            if name == "prefill":
                yield name, shape.warps, shape.stages, size | tile, absent
                continue
            apart = {"PARTS": 1, "DEPENDENT": 0}, (*absent, "out", "arrivals")
            merging = {"PARTS": attention.LARGEST_SPLIT, "DEPENDENT": 0}, absent
            for parts, without in (apart, merging):
                yield name, shape.warps, shape.stages, size | tile | parts, without
    for power in range(attention.LARGEST_SPLIT.bit_length()):
        yield "merge", 4, 1, {"PARTS": 1 << power, "D": _HEAD_DIM}, ()
    warps = pointwise.norm_warps(_HIDDEN)
    norm = {"BLOCK": _HIDDEN, "EXPERTS": _EXPERTS, "E": _EXPERTS, "CHOSEN": _EXPERTS_PER_TOKEN}
    single, of_experts = {"SPLITS": 1, "CHOICES": 1}, {"CHOICES": _EXPERTS_PER_TOKEN}
    no_router = ("gate", "logits", "ids", "weights")
    yield "residual_norm", warps, 1, norm | single, ("partials", "total", *no_router)
    yield "start_norm", warps, 1, {"BLOCK": _HIDDEN}, ()
    rotations = tuple({"D": _HEAD_DIM, "ROWS": rows} for rows in (1, 16))
    for splits in (1, 2, 4, 8, 16):
        split = {**single, "SPLITS": splits}
        yield "residual_norm", warps, 1, norm | split | of_experts, no_router
        yield "residual_norm", warps, 1, norm | split, ()
        for rotation in rotations:
            heads = {"SPLITS": splits, "H": _HEADS, "G": _KV_HEADS}
            yield (
                "rotate_store",
                pointwise.rotation_warps(rotation["ROWS"]),
                1,
                heads | rotation,
                (),
            )
    for rotation in rotations:
        yield "rotate", pointwise.rotation_warps(rotation["ROWS"]), 1, rotation, ()
    yield "route", 1, 1, {"E": _EXPERTS, "CHOSEN": _EXPERTS_PER_TOKEN, "EXPERTS": _EXPERTS}, ()
