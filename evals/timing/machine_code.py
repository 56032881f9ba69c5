"""A Triton kernel as an architecture's machine code: compiled ahead of time, then counted.

Needs triton but no GPU: triton brings the assembler and the disassembler. Does not work in Triton's
interpreter (TRITON_INTERPRET=1), whose kernels cannot be compiled. Knows no kernel of ours, but how
all of them are compiled at a launch.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qmix.kernels.gpu.launch import COMPILER_OPTIONS

# Bytes of shared memory that a block may use (CUDA C++ programming guide, compute capabilities).
_SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in _SHARED_KIB.items()}

TRITON_VERSION = str(triton.__version__)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX_INSTRUCTION = re.compile(r"\b(?:[HIDQ]G?|UTC\w*)MMA\b")  # HFMA2.MMA is not one


@dataclass(frozen=True, eq=False)
class KernelSource:
    """A kernel, and what Triton would learn about its arguments at a launch.

    Attributes:
        function: the Triton function.
        constants: compile-time constants by name; None stands for a tensor that is not passed.
        types: Triton's type of each other argument, such as "*fp16" or "i32".
        multiples: names of arguments that are multiples of 16, mostly pointers.
        weights: packed weights that a thread multiplies in one iteration of the loop; may be 0.
        copies: 128-bit copies that a thread needs in one iteration of the loop.
        options: of the compiler, beyond those of every launch.
    """

    function: Any
    constants: Mapping[str, object]
    types: Mapping[str, str]
    multiples: Set[str]
    warps: int
    stages: int
    arch: int
    weights: int
    copies: int
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelCost:
    """What one kernel costs.

    Attributes:
        registers: of a thread; a multiprocessor has 65536.
        stack: bytes of local memory of a thread, which holds spilled registers.
        shared: bytes of shared memory of a thread block.
        loop: machine instructions of the loop around the matrix instructions; 0 without such a
            loop.
        per_weight: these instructions divided by the weights that a thread multiplies in the loop.
        wide_copies: 128-bit copies from global memory in the loop.
        needed_copies: number of copies that its codes, or its keys and values, need.
        exchanges: stores to shared memory and shuffles in the loop, by which threads exchange
            values.
        matrix_instruction: that of the loop; empty without one.
        opcodes: number of occurrences of each instruction in the loop.
    """

    registers: int
    stack: int
    shared: int
    loop: int
    per_weight: float
    wide_copies: int
    needed_copies: int
    exchanges: int
    matrix_instruction: str
    opcodes: dict[str, int]


def compiled(source: KernelSource) -> Any:
    """Triton's compiled kernel, with its `asm` by stage."""
    names = source.function.arg_names
    return triton.compile(
        ASTSource(
            fn=source.function,
            signature={name: source.types.get(name, "constexpr") for name in names},
            constexprs=dict(source.constants),
            attrs={
                (index,): [["tt.divisibility", 16]]
                for index, name in enumerate(names)
                if name in source.types and name in source.multiples
            },
        ),
        target=GPUTarget("cuda", source.arch, 32),
        options={
            "num_warps": source.warps,
            "num_stages": source.stages,
            **COMPILER_OPTIONS,
            **source.options,
        },
    )


def compile_kernel(source: KernelSource) -> KernelCost:
    """Compile and disassemble a kernel."""
    kernel = compiled(source)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        body = _loop(_run("nvdisasm", "-c", str(cubin)))
    opcodes = Counter(_opcode(line) for line in body)

    def count(*prefixes: str) -> int:
        return sum(n for name, n in opcodes.items() if name.startswith(prefixes))

    return KernelCost(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared=kernel.metadata.shared,
        loop=len(body),
        per_weight=len(body) / source.weights if source.weights else 0.0,
        wide_copies=sum(
            n for name, n in opcodes.items() if "LDG" in name and name.endswith(".128")
        ),
        needed_copies=source.copies if body else 0,
        exchanges=count("STS", "SHFL", "MOVM"),
        matrix_instruction=next(filter(_MATRIX_INSTRUCTION.search, opcodes), ""),
        opcodes=dict(opcodes.most_common()),
    )


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
    return min(
        (body for body in loops if any(map(_MATRIX_INSTRUCTION.search, body))), key=len, default=[]
    )


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
