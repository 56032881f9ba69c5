"""Compile every selectable GPU kernel ahead of time, and count what its inner loop costs.

Needs triton but no GPU. Shows what a run on a GPU would not: registers, spills, shared memory
against the architecture's limit, and the machine instructions that the loop over the weights takes
for each weight. Says nothing of time. Kernels that read no weights (attention, norms, router) are
compiled in the 8x7B's shapes.

Does not work in Triton's interpreter (TRITON_INTERPRET=1), whose kernels cannot be compiled.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from qmix.errors import QualityError
from qmix.evals import markdown
from qmix.evals.command import say
from qmix.evals.timing.machine_code import SHARED_LIMIT, KernelCost, KernelSource, compile_kernel
from qmix.evals.timing.plain_kernels import PlainKernel, plain_kernels
from qmix.kernels.gpu import attention, moe, moe_triton
from qmix.kernels.gpu.moe import Config, configs
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

_HEADER = (
    *("kernel", "registers", "stack", "shared", "loop", "per weight"),
    *("128-bit", "exchanges", "faults"),
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
            f"{self.config.columns} columns"
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
        }
        names = function.arg_names
        return KernelSource(
            function,
            {name: constants[name] for name in names if name in constants},
            {name: _POINTERS.get(name, "i32") for name in names if name not in constants},
            {*_POINTERS, *_MULTIPLES},
            config.warps,
            config.stages,
            self.arch,
            weights=tile_format.inputs,  # 16 byte rows of two weights, over 32 threads
            copies=tile_format.inputs // 32,
        )


AnyKernel = TypeVar("AnyKernel", WeightKernel, PlainKernel, WeightKernel | PlainKernel)


def weight_kernels(
    archs: Sequence[int], tile_formats: Sequence[TileFormat] = FORMATS
) -> Iterator[WeightKernel]:
    """All kernels that `qmix.kernels.gpu.moe` can launch, except the pointwise `combine`."""
    for arch in archs:
        for tile_format in tile_formats:
            for config in configs(tile_format):
                yield WeightKernel("packed_matmul", tile_format, config, False, arch)
                for kernel in ("gate_up", "down"):
                    yield WeightKernel(kernel, tile_format, config, True, arch)
                    if config.columns <= DECODE_TOKENS:
                        yield WeightKernel(kernel, tile_format, config, False, arch)
            yield WeightKernel("dequantize", tile_format, Config(0, 4, 1), False, arch)


def compile_variant(variant: WeightKernel | PlainKernel) -> KernelCost:
    """Compile and disassemble a kernel."""
    return compile_kernel(variant.source())


def faults(variant: WeightKernel | PlainKernel, cost: KernelCost) -> list[str]:
    """What must not occur: spills, too much shared memory, narrow loads, exchanges in the loop."""
    wrong = []
    if cost.stack:
        wrong.append(f"{cost.stack} bytes of registers spilled")
    if cost.shared > SHARED_LIMIT[variant.arch]:
        wrong.append(f"{cost.shared} bytes of shared memory, of {SHARED_LIMIT[variant.arch]}")
    if cost.wide_copies < cost.needed_copies:
        wrong.append(f"{cost.wide_copies} 128-bit copies, where codes need {cost.needed_copies}")
    if cost.exchanges and isinstance(variant, WeightKernel):  # a softmax has to exchange
        wrong.append(f"{cost.exchanges} exchanges between threads in the loop")
    return wrong


def compile_all(
    variants: Sequence[AnyKernel], workers: int
) -> Iterator[tuple[AnyKernel, KernelCost]]:
    """Compile kernels in processes of their own; yields them in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(variants, pool.map(compile_variant, variants), strict=True)


def _cells(variant: WeightKernel | PlainKernel, cost: KernelCost) -> tuple[str, ...]:
    return (
        str(variant),
        str(cost.registers),
        str(cost.stack),
        str(cost.shared),
        str(cost.loop),
        f"{cost.per_weight:.2f}",
        f"{cost.wide_copies} of {cost.needed_copies}",
        str(cost.exchanges),
        "; ".join(faults(variant, cost)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring. The exit code is 5 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.aot", description=__doc__)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=list(SHARED_LIMIT),
        choices=SHARED_LIMIT,
        help="compute capabilities, such as 90",
    )
    parser.add_argument(
        "--all", action="store_true", help="every tile format and dtype, not only the usual ones"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each kernel")
    options = parser.parse_args(arguments)
    kernels: list[WeightKernel | PlainKernel] = [
        *weight_kernels(options.arch, FORMATS if options.all else FORMATS[:2]),
        *plain_kernels(options.arch, attention.DTYPES if options.all else attention.DTYPES[:1]),
    ]
    failed = 0
    if not options.json:
        sys.stdout.write(markdown.table(_HEADER, ()))
    for variant, cost in compile_all(kernels, options.workers):
        wrong = faults(variant, cost)
        failed += bool(wrong)
        if options.json:
            record = {"variant": asdict(variant), "cost": asdict(cost), "faults": wrong}
            sys.stdout.write(json.dumps(record, default=str) + "\n")
        else:
            sys.stdout.write(markdown.row(_cells(variant, cost)))
        sys.stdout.flush()
    say(f"{len(kernels)} kernels, {failed} with faults")
    return QualityError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
