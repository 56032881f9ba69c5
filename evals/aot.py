"""Compile every selectable GPU kernel ahead of time, and compare what its inner loop costs.

Needs triton but no GPU. Shows what a run on a GPU would not: registers, spills, shared memory
against the architecture's limit, the matrix instruction, and the machine instructions that the loop
over the weights takes for each weight. Says nothing of time. Kernels that read no weights
(attention, norms, router) are compiled in the 8x7B's shapes.

What an earlier run found with the same Triton is in evals/records/aot.json. A kernel that has got
worse is a fault. `make aot` runs this with every Triton that users have.

Does not work in Triton's interpreter (TRITON_INTERPRET=1), whose kernels cannot be compiled.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import chain
from multiprocessing import get_context
from typing import TypeVar

from qmix.errors import QualityError
from qmix.evals import aot_record, markdown
from qmix.evals.command import say
from qmix.evals.timing.machine_code import (
    SHARED_LIMIT,
    TRITON_VERSION,
    KernelCost,
    compile_kernel,
)
from qmix.evals.timing.plain_kernels import PlainKernel, plain_kernels
from qmix.evals.timing.weight_kernels import FORMATS, FUSED, WeightKernel, weight_kernels
from qmix.kernels.gpu import attention
from qmix.kernels.moe import DECODE_TOKENS

_HEADER = (
    *("kernel", "registers", "stack", "shared", "loop", "per weight"),
    *("matrix instruction", "128-bit", "exchanges", "faults"),
)

GENERATIONS = (80, 90, 120)

AnyKernel = TypeVar("AnyKernel", WeightKernel, PlainKernel, WeightKernel | PlainKernel)


def usual_kernels(archs: Sequence[int]) -> Iterator[WeightKernel | PlainKernel]:
    """The two usual formats in every variant, the others as a decode step has them; bfloat16."""
    yield from weight_kernels(archs, FORMATS[:2])
    yield from filter(_decodes, weight_kernels(archs, FORMATS[2:]))
    yield from plain_kernels(archs)


def _decodes(variant: WeightKernel) -> bool:
    """Whether a decode step launches it: usually two warps of 8 columns.

    Other blocks, and the largest, are compiled where a product does more after its loop, which
    costs registers, and for three generations only: the others have the same registers.
    """
    if variant.is_sorted:
        return False
    columns, warps = variant.config.columns, variant.config.warps
    if variant.is_padded or variant.is_largest:
        return columns == 8 and not variant.early and variant.arch in GENERATIONS
    if variant.kernel == "dequantize" or (columns, warps) == (8, 2):
        return True
    finishes = variant.kernel in FUSED or variant.is_split
    return (
        columns <= DECODE_TOKENS and finishes and not variant.early and variant.arch in GENERATIONS
    )


def decode_kernels(archs: Sequence[int]) -> Iterator[WeightKernel]:
    """What a decode step of up to 8 tokens launches, in the two usual formats, one by one."""
    for variant in weight_kernels(archs, FORMATS[:2]):
        usual = (variant.config.columns, variant.config.warps, variant.is_sorted) == (8, 2, False)
        if usual and not (variant.early or variant.is_padded or variant.is_largest):
            yield variant


def attention_over_codes(archs: Sequence[int]) -> Iterator[PlainKernel]:
    """What reads keys and values in 8 bits, in a decode step and for a prompt without padding."""
    for variant in plain_kernels(archs):
        usual = {"padding_mask", "starts"} <= set(variant.absent)
        step = dict(variant.constants).get("PARTS", 0) > 1 and variant.codes == "new codes"
        early = dict(variant.constants).get("DEPENDENT", 0)
        if usual and variant.codes and not early and (step or variant.kernel == "prefill"):
            yield variant


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
    if isinstance(variant, WeightKernel):  # a softmax has to exchange
        if cost.exchanges:
            wrong.append(f"{cost.exchanges} exchanges between threads in the loop")
        if cost.loop and not cost.matrix_instruction:
            wrong.append("no matrix instruction")
    return wrong


def compile_all(
    variants: Sequence[AnyKernel], workers: int
) -> Iterator[tuple[AnyKernel, KernelCost]]:
    """Compile kernels in processes of their own; yields them in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(variants, pool.map(compile_variant, variants), strict=True)


def _cells(
    variant: WeightKernel | PlainKernel, cost: KernelCost, wrong: Sequence[str]
) -> tuple[str, ...]:
    return (
        str(variant),
        str(cost.registers),
        str(cost.stack),
        str(cost.shared),
        str(cost.loop),
        f"{cost.per_weight:.2f}",
        cost.matrix_instruction,
        f"{cost.wide_copies} of {cost.needed_copies}",
        str(cost.exchanges),
        "; ".join(wrong),
    )


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--decode", action="store_true", help="only what a decode step of up to 8 tokens launches"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only kernels whose names contain one of these, such as 'down int8 64,'",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each kernel")
    parser.add_argument("--write", action="store_true", help="record what was found")
    return parser


def _chosen(options: argparse.Namespace) -> list[WeightKernel | PlainKernel]:
    kernels: Iterable[WeightKernel | PlainKernel]
    if options.decode:
        kernels = decode_kernels(options.arch)
    elif options.all:
        kernels = chain(weight_kernels(options.arch), plain_kernels(options.arch, attention.DTYPES))
    else:
        kernels = usual_kernels(options.arch)
    return [kernel for kernel in kernels if any(text in str(kernel) for text in options.only)]


def _show(
    variant: WeightKernel | PlainKernel, cost: KernelCost, wrong: Sequence[str], *, as_json: bool
) -> None:
    if as_json:
        record = {"variant": asdict(variant), "cost": asdict(cost), "faults": wrong}
        sys.stdout.write(json.dumps(record, default=str) + "\n")
    else:
        sys.stdout.write(markdown.row(_cells(variant, cost, wrong)))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring. The exit code is 5 if a kernel has a fault."""
    options = _parser().parse_args(arguments)
    kernels = _chosen(options)
    recorded = {} if options.write else aot_record.recorded(TRITON_VERSION)
    found: dict[str, aot_record.Recorded] = {}
    failed = 0
    if not options.json:
        sys.stdout.write(markdown.table(_HEADER, ()))
    try:
        for variant, cost in compile_all(kernels, options.workers):
            found[str(variant)] = aot_record.of(cost)
            wrong = [*faults(variant, cost), *aot_record.worse(cost, recorded.get(str(variant)))]
            failed += bool(wrong)
            _show(variant, cost, wrong, as_json=options.json)
    finally:  # also of a run that is ended
        if options.write:
            aot_record.write(TRITON_VERSION, found)
    if not options.write:
        say(f"{len(found.keys() - recorded.keys())} of {len(found)} kernels have no record")
    say(f"Triton {TRITON_VERSION}: {len(kernels)} kernels, {failed} with faults")
    return QualityError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
