"""The GPU kernels that read packed weights, in all variants. Nothing is compiled here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.evals.timing.machine_code import KernelSource
from qmix.kernels.gpu import moe, moe_triton
from qmix.kernels.gpu.grid import Config, configs
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.packed.tile_format import TileFormat

FORMATS = (
    TileFormat("nf4", 64),
    TileFormat("int4", 128),
    TileFormat("nf4", 128),
    TileFormat("int4", 64),
    TileFormat("int4", 128, symmetric=False),
    TileFormat("int4", 64, symmetric=False),
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
    "out": "*bf16",
}
# Integers that are multiples of 16 in every packed model, as triton finds out at a launch.
_MULTIPLES = ("D", "F", "N", "K", "offset", "SECOND")


@dataclass(frozen=True)
class WeightKernel:
    """A kernel that reads packed weights, with what is constant in it and the architecture."""

    kernel: str
    tile_format: TileFormat
    config: Config
    is_sorted: bool
    arch: int

    def __str__(self) -> str:
        zeros = "" if self.tile_format.symmetric else " asymmetric"
        how = " sorted" if self.is_sorted else ""
        return (
            f"sm_{self.arch} {self.kernel}{how} {self.tile_format.kind} {self.tile_format.inputs}{zeros}, "
            f"{self.config.columns} columns, {self.config.warps} warps"
        )

    def source(self) -> KernelSource:
        """The kernel in the form that is compiled."""
        function: Any = getattr(moe_triton, self.kernel)
        tile_format, config = self.tile_format, self.config
        constants = {
            "KIND": tile_format.kind,
            "C": tile_format.inputs,
            "SYMMETRIC": tile_format.symmetric,
            "CHOICES": 2,
            "E": 8,
            "SORTED": self.is_sorted,
            "WARPS": config.warps,
            "COLUMNS": config.columns,
            "STAGES": config.stages,
            "SHRINK": moe.SHRINK,
            "GROW": 1 / moe.SHRINK,
            "SHARED": 2,
            "squares": None,
            "S": 1,
            "SLICES": 1,
        }
        names = function.arg_names
        unaligned = function.do_not_specialize_on_alignment
        return KernelSource(
            function,
            {name: constants[name] for name in names if name in constants},
            {name: _POINTERS.get(name, "i32") for name in names if name not in constants},
            {*_POINTERS, *_MULTIPLES} - set(unaligned),
            config.warps,
            config.stages,
            self.arch,
            weights=tile_format.inputs,  # 16 byte rows of two weights, over 32 threads
            copies=tile_format.inputs // 32,
        )


def weight_kernels(
    archs: Sequence[int], tile_formats: Sequence[TileFormat] = FORMATS
) -> Iterator[WeightKernel]:
    """All kernels that `qmix.kernels.gpu.moe` can launch, except the pointwise `combine`.

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
            yield WeightKernel("dequantize", tile_format, Config(0, 4, 1), False, arch)
