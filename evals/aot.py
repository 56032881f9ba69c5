"""Compile every selectable GPU program ahead of time and count what its inner loop costs.

Needs triton, no GPU: triton brings the assembler and the disassembler. Shows what a GPU would not
tell anyway: registers, spills, shared memory against the architecture's limit, and the machine
instructions a weight of the loop that reads the weights. Says nothing of time.

Must not run in Triton's interpreter (TRITON_INTERPRET=1): its kernels cannot be compiled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qmix.kernels.gpu import experts, programs
from qmix.kernels.gpu.experts import Config, configs
from qmix.kernels.gpu.order import TileFormat

# Shared memory a block may have (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
FORMATS = (
    TileFormat("nf4", 64),
    TileFormat("int4", 128),
    TileFormat("nf4", 128),
    TileFormat("int4", 64),
    TileFormat("int4", 128, symmetric=False),
    TileFormat("int4", 64, symmetric=False),
)

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
    "partial": "*fp32",
    "out": "*bf16",
}
# Integers that are multiples of 16 in every model with a packed order; triton sees it at run time.
_MULTIPLES = ("D", "F", "N", "K", "offset", "SECOND")


@dataclass(frozen=True)
class Variant:
    """One program as it is compiled: its name, what is constant in it, and the architecture."""

    program: str
    plan: TileFormat
    config: Config
    is_sorted: bool
    arch: int

    def __str__(self) -> str:
        zeros = "" if self.plan.symmetric else " asymmetric"
        how = " sorted" if self.is_sorted else ""
        return (
            f"sm_{self.arch} {self.program}{how} {self.plan.kind} {self.plan.inputs}{zeros}, "
            f"{self.config.columns} columns"
        )


@dataclass(frozen=True)
class Cost:
    """What one variant costs.

    Attributes:
        registers: a thread's; a multiprocessor has 65536.
        stack: bytes of local memory a thread, where spilled registers go.
        shared: bytes of shared memory a program.
        loop: machine instructions of the loop that reads the weights; 0 if there is none.
        per_weight: the same divided by the weights that a thread multiplies in it.
        wide_copies: 128-bit copies from global memory in the loop.
        needed_copies: as many as its codes need.
        exchanges: stores to shared memory and shuffles in the loop: a layout conversion.
        opcodes: how often each instruction occurs in the loop.
    """

    registers: int
    stack: int
    shared: int
    loop: int
    per_weight: float
    wide_copies: int
    needed_copies: int
    exchanges: int
    opcodes: dict[str, int]


def variants(archs: Sequence[int], plans: Sequence[TileFormat] = FORMATS) -> Iterator[Variant]:
    """Everything that `qmix.kernels.gpu.experts` can start, but for the pointwise `combine`."""
    for arch in archs:
        for plan in plans:
            for config in configs(plan):
                yield Variant("product", plan, config, False, arch)
                for program in ("gate_up", "down"):
                    yield Variant(program, plan, config, True, arch)
                    if config.columns <= experts.DECODE_TOKENS:
                        yield Variant(program, plan, config, False, arch)
            yield Variant("dequantize", plan, Config(0, 4, 1), False, arch)


def compile_variant(variant: Variant) -> Cost:
    """Compile and disassemble one variant."""
    function: Any = getattr(programs, variant.program)
    plan, config = variant.plan, variant.config
    every = {
        "KIND": plan.kind,
        "C": plan.inputs,
        "SYMMETRIC": plan.symmetric,
        "CHOICES": 2,
        "E": 8,
        "SORTED": variant.is_sorted,
        "WARPS": config.warps,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "SHRINK": experts.SHRINK,
        "GROW": 1 / experts.SHRINK,
        "SHARED": 2,
    }
    names = function.arg_names
    constants = {name: every[name] for name in names if name in every}
    signature = {
        name: "constexpr" if name in constants else _POINTERS.get(name, "i32") for name in names
    }
    hint = [["tt.divisibility", 16]]
    aligned = {
        (index,): hint
        for index, name in enumerate(names)
        if name in _POINTERS or name in _MULTIPLES
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", variant.arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "program.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        body = _loop(_run("nvdisasm", "-c", str(cubin)))
    opcodes = Counter(_opcode(line) for line in body)

    def count(*prefixes: str) -> int:
        return sum(n for name, n in opcodes.items() if name.startswith(prefixes))

    return Cost(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared=compiled.metadata.shared,
        loop=len(body),
        per_weight=len(body) / plan.inputs,  # 16 byte rows of two weights over 32 threads
        wide_copies=sum(
            n for name, n in opcodes.items() if "LDG" in name and name.endswith(".128")
        ),
        needed_copies=plan.inputs // 32 if body else 0,
        exchanges=count("STS", "SHFL", "MOVM"),
        opcodes=dict(opcodes.most_common()),
    )


def faults(variant: Variant, cost: Cost) -> list[str]:
    """What must never be: spills, too much shared memory, narrow loads, exchanges in the loop."""
    found = []
    if cost.stack:
        found.append(f"{cost.stack} bytes of registers spilled")
    if cost.shared > SHARED_LIMIT[variant.arch]:
        found.append(f"{cost.shared} bytes of shared memory, of {SHARED_LIMIT[variant.arch]}")
    if cost.wide_copies < cost.needed_copies:
        found.append(f"{cost.wide_copies} 128-bit copies, where codes need {cost.needed_copies}")
    if cost.exchanges:
        found.append(f"{cost.exchanges} exchanges between threads in the loop")
    return found


def compile_all(chosen: Sequence[Variant], workers: int) -> Iterator[tuple[Variant, Cost]]:
    """Compile variants in processes of their own, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(chosen, pool.map(compile_variant, chosen), strict=True)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _loop(listing: str) -> list[str]:
    """The instructions of the shortest loop with a matrix instruction in it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:  # backwards
                loops.append(instructions[labels[branch[1]] :])
    return min((body for body in loops if any("MMA" in line for line in body)), key=len, default=[])


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.aot", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=SHARED_LIMIT
    )
    parser.add_argument("--all", action="store_true", help="every tile format, not the usual two")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one record a line, opcodes included")
    options = parser.parse_args(arguments)
    chosen = list(variants(options.arch, FORMATS if options.all else FORMATS[:2]))
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
            sys.stdout.write(json.dumps(record) + "\n")
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
