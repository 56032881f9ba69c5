"""The GPU kernels that read packed weights, in all variants. Nothing is compiled here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmix.evals.timing.machine_code import KernelSource
from qmix.kernels.gpu import fused_triton, moe, moe_triton
from qmix.kernels.gpu.grid import LARGEST_SPLIT, Config, configs, roomy
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.packed.tile_format import TileFormat

FORMATS = (
    TileFormat("nf4", 64),
    TileFormat("int4", 128),
    TileFormat("nf4", 128),
    TileFormat("int4", 64),
    TileFormat("int4", 128, symmetric=False),
    TileFormat("int4", 64, symmetric=False),
    TileFormat("int4", 32, symmetric=False),  # Q4_K
    TileFormat("nf4", 64, own_table=True),
    TileFormat("e2m1", 64, group=16),  # NVFP4
    TileFormat("int4", 64, symmetric=False, group=16),
    TileFormat("int8", 64),
    TileFormat("int8", 64, symmetric=False),
    TileFormat("int8", 32),  # Q8_0
    TileFormat("int8", 64, group=16),
    TileFormat("int2", 128, group=64),  # of `--method auto`, and the next three
    TileFormat("int2", 128, group=32),
    TileFormat("int3", 128),
    TileFormat("int3", 128, group=32),
    TileFormat("int2", 128, symmetric=False, group=16),  # Q2_K
    TileFormat("int3", 128, group=16),  # Q3_K
    TileFormat("int5", 128, symmetric=False, group=32),  # Q5_K
    TileFormat("int6", 128, group=16),  # Q6_K
)

_POINTERS = {
    "addresses": "*i64",
    "ids": "*i64",
    "order": "*i32",
    "starts": "*i32",
    "blocks": "*i32",
    "matrix": "*u8",
    "x": "*fp16",
    "hidden": "*fp16",
    "weights": "*fp32",
    "partials": "*fp32",
    "sums": "*fp32",
    "arrivals": "*i32",
    "out": "*bf16",
    **dict.fromkeys(
        ("q", "keys", "values", "cos", "sin", "residual", "weight", "total", "gate"), "*bf16"
    ),
    **dict.fromkeys(("arrivals", "past"), "*i32"),
    **dict.fromkeys(("squares", "scale", "last_squares", "last_scale", "shares"), "*fp32"),
    "weighted": "*fp16",
}
_STRIDES = ("k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")
FUSED = ("matmul_rotate_store", "matmul_add_route", "down_add")
# Integers that are multiples of 16 in every packed model, as triton finds out at a launch.
_MULTIPLES = ("D", "F", "N", "K", "offset", "SECOND", *_STRIDES)


@dataclass(frozen=True)
class WeightKernel:
    """A kernel that reads packed weights, with what is constant in it and the architecture.

    Attributes:
        is_split: K is split, and the last split adds all of them up.
        early: it is a dependent launch, and asks for its weights before it waits.
        is_normed: its input is still to be divided by the root of the mean square.
        is_padded: rows may have padding on the left.
        is_largest: the loops that are unrolled (splits that are added up, shares of a norm) have
            the most rounds that occur, where otherwise they have those of an H100.
    """

    kernel: str
    tile_format: TileFormat
    config: Config
    is_sorted: bool
    arch: int
    is_split: bool = False
    early: bool = False
    is_normed: bool = False
    is_padded: bool = False
    is_largest: bool = False

    def __str__(self) -> str:
        how = " sorted" if self.is_sorted else " split" if self.is_split else ""
        how += " dependent" * self.early + " normed" * self.is_normed + " padded" * self.is_padded
        how += " largest" * self.is_largest
        return (
            f"sm_{self.arch} {self.kernel}{how} {self.tile_format}, "
            f"{self.config.columns} columns, {self.config.warps} warps"
        )

    def source(self) -> KernelSource:
        """The kernel in the form that is compiled."""
        module = fused_triton if self.kernel in FUSED else moe_triton
        function: Any = getattr(module, self.kernel)
        tile_format, config = self.tile_format, self.config
        constants: dict[str, object] = {
            **moe.format_constants(tile_format),
            "CHOICES": 2,
            "E": 8,
            "SORTED": self.is_sorted,
            "WARPS": config.warps,
            "COLUMNS": config.columns,
            "STAGES": config.stages,
            "SHRINK": moe.SHRINK,
            "GROW": 1 / moe.SHRINK,
            "SHARED": 2,
            "DEPENDENT": self.early,
            "PREFETCH": self.early,
            **self._norm_and_heads(),
        }
        if self.kernel == "gate_up" and not self.is_split:
            constants |= {"sums": None, "arrivals": None}
        if self.kernel == "matmul_rotate_store" and not self.is_padded:
            constants |= {"starts": None}
        names = function.arg_names
        types = {name: "fp32" if name == "eps" else _POINTERS.get(name, "i32") for name in names}
        unaligned = function.do_not_specialize_on_alignment
        return KernelSource(
            function,
            {name: constants[name] for name in names if name in constants},
            {name: types[name] for name in names if name not in constants},
            {*_POINTERS, *_MULTIPLES} - set(unaligned),
            config.warps,
            config.stages,
            self.arch,
            weights=tile_format.inputs,  # 16 byte rows of two weights, over 32 threads
            copies=tile_format.code_bytes // 2048,
            options=roomy(config) if self.kernel in ("gate_up", "matmul_add_route") else {},
        )

    def _norm_and_heads(self) -> dict[str, object]:
        """Constants of the 8x7B beyond a product's, and the tensors that are not passed."""
        if not (self.is_normed or self.kernel in FUSED):
            return {"squares": None, "S": 1, "SLICES": 1}
        own = 32 * 4 // self.config.warps  # shares of a norm: one for each block of a product
        read = 32 * 4 if self.is_largest else own
        reads = self.kernel in ("gate_up", "matmul_rotate_store")
        slices = dict.fromkeys(("S", "SLICES"), read if reads else own)
        last = dict.fromkeys(("LAST_S", "LAST_SLICES"), read)
        model = {"H": 32, "G": 8, "EXPERTS": 8, "CHOSEN": 2}
        return {"Z": LARGEST_SPLIT if self.is_largest else 8, **model, **slices, **last}


def weight_kernels(
    archs: Sequence[int], tile_formats: Sequence[TileFormat] = FORMATS
) -> Iterator[WeightKernel]:
    """All kernels that `qmix.kernels.gpu.moe` and `.fused` can launch, except pointwise ones.

    No argument changes what is compiled: kernels are not specialized to counts, and all other
    integers are multiples of 16.
    """
    for arch in archs:
        for tile_format in tile_formats:
            for config in configs(tile_format):
                yield WeightKernel("packed_matmul", tile_format, config, False, arch)
                for kernel in ("gate_up", "down"):
                    yield WeightKernel(kernel, tile_format, config, True, arch)
                    if config.columns <= DECODE_TOKENS:
                        yield WeightKernel(kernel, tile_format, config, False, arch)
                if config.columns <= DECODE_TOKENS:
                    yield from _of_a_step(tile_format, config, arch)
            yield WeightKernel("dequantize", tile_format, Config(0, 4, 1), False, arch)


def _of_a_step(tile_format: TileFormat, config: Config, arch: int) -> Iterator[WeightKernel]:
    """What fused launches add; from compute capability 9.0 on they can be dependent ones."""
    gate_up = WeightKernel("gate_up", tile_format, config, False, arch)
    for early in (False, True)[: 1 + (arch >= 90)]:
        normed = replace(gate_up, early=early, is_normed=True)
        fused = [replace(gate_up, kernel=kernel, early=early) for kernel in FUSED]
        padded = replace(fused[0], is_padded=True)
        for one in (*fused, padded, normed, replace(normed, is_split=True)):
            yield one
            yield replace(one, is_largest=True)
        yield replace(gate_up, early=early, is_split=True)
        if early:
            yield replace(gate_up, early=True)
