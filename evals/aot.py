"""Compile every selectable GPU kernel ahead of time and count what its inner loop costs.

Needs triton, no GPU. Shows what a GPU would not
tell anyway: registers, spills, shared memory against the architecture's limit, and the machine
instructions a weight of the loop that reads the weights. Says nothing of time. Kernels that read
no weights (attention, norms, router) are compiled in the 8x7B's shapes.

Must not run in Triton's interpreter (TRITON_INTERPRET=1): its kernels cannot be compiled.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from qmix.evals.timing.machine_code import SHARED_LIMIT, Cost, Source, cost_of
from qmix.evals.timing.plain_kernels import Plain, plain_variants
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
# Integers that are multiples of 16 in every model with a packed layout; triton sees it at run time.
_MULTIPLES = ("D", "F", "N", "K", "offset", "SECOND")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled: its name, what is constant in it, and the architecture."""

    kernel: str
    plan: TileFormat
    config: Config
    is_sorted: bool
    arch: int

    def __str__(self) -> str:
        zeros = "" if self.plan.symmetric else " asymmetric"
        how = " sorted" if self.is_sorted else ""
        return (
            f"sm_{self.arch} {self.kernel}{how} {self.plan.kind} {self.plan.inputs}{zeros}, "
            f"{self.config.columns} columns"
        )

    def source(self) -> Source:
        """What is to be compiled."""
        function: Any = getattr(moe_triton, self.kernel)
        plan, config = self.plan, self.config
        every = {
            "KIND": plan.kind,
            "C": plan.inputs,
            "SYMMETRIC": plan.symmetric,
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
        return Source(
            function,
            {name: every[name] for name in names if name in every},
            {name: _POINTERS.get(name, "i32") for name in names if name not in every},
            {*_POINTERS, *_MULTIPLES},
            config.warps,
            config.stages,
            self.arch,
            weights=plan.inputs,  # 16 byte rows of two weights over 32 threads
            copies=plan.inputs // 32,
        )


AnyVariant = TypeVar("AnyVariant", Variant, Plain, Variant | Plain)


def variants(archs: Sequence[int], plans: Sequence[TileFormat] = FORMATS) -> Iterator[Variant]:
    """Everything that `qmix.kernels.gpu.moe` can start, but for the pointwise `combine`."""
    for arch in archs:
        for plan in plans:
            for config in configs(plan):
                yield Variant("packed_matmul", plan, config, False, arch)
                for kernel in ("gate_up", "down"):
                    yield Variant(kernel, plan, config, True, arch)
                    if config.columns <= DECODE_TOKENS:
                        yield Variant(kernel, plan, config, False, arch)
            yield Variant("dequantize", plan, Config(0, 4, 1), False, arch)


def compile_variant(variant: Variant | Plain) -> Cost:
    """Compile and disassemble one variant."""
    return cost_of(variant.source())


def faults(variant: Variant | Plain, cost: Cost) -> list[str]:
    """What must never be: spills, too much shared memory, narrow loads, exchanges in the loop."""
    found = []
    if cost.stack:
        found.append(f"{cost.stack} bytes of registers spilled")
    if cost.shared > SHARED_LIMIT[variant.arch]:
        found.append(f"{cost.shared} bytes of shared memory, of {SHARED_LIMIT[variant.arch]}")
    if cost.wide_copies < cost.needed_copies:
        found.append(f"{cost.wide_copies} 128-bit copies, where codes need {cost.needed_copies}")
    if cost.exchanges and isinstance(variant, Variant):  # a softmax has to exchange
        found.append(f"{cost.exchanges} exchanges between threads in the loop")
    return found


def compile_all(chosen: Sequence[AnyVariant], workers: int) -> Iterator[tuple[AnyVariant, Cost]]:
    """Compile variants in processes of their own, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(chosen, pool.map(compile_variant, chosen), strict=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.aot", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=SHARED_LIMIT
    )
    parser.add_argument(
        "--all", action="store_true", help="every tile format and dtype, not the usual ones"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one record a line, opcodes included")
    options = parser.parse_args(arguments)
    chosen: list[Variant | Plain] = [
        *variants(options.arch, FORMATS if options.all else FORMATS[:2]),
        *plain_variants(options.arch, attention.DTYPES if options.all else attention.DTYPES[:1]),
    ]
    failed = 0
    if not options.json:
        sys.stdout.write(
            "| variant | registers | stack | shared | loop | per weight | 128-bit | exchanges |\n"
            "|---|---|---|---|---|---|---|---|\n"
        )
    for variant, cost in compile_all(chosen, options.workers):
        wrong = faults(variant, cost)
        failed += bool(wrong)
        if options.json:
            record = {"variant": asdict(variant), "cost": asdict(cost), "faults": wrong}
            sys.stdout.write(json.dumps(record, default=str) + "\n")
        else:
            sys.stdout.write(
                f"| {variant} | {cost.registers} | {cost.stack} | {cost.shared} | {cost.loop} "
                f"| {cost.per_weight:.2f} | {cost.wide_copies} of {cost.needed_copies} "
                f"| {cost.exchanges} |{' ' + '; '.join(wrong) if wrong else ''}\n"
            )
        sys.stdout.flush()
    sys.stderr.write(f"{len(chosen)} variants, {failed} with faults\n")
    return 5 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
